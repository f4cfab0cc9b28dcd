"""`quantize_checkpoint`: a model on disk to a quantized model on disk, block by block."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from awq_jax.clock import Clock
from awq_jax.errors import InputError
from awq_jax.formats.chat_syntax import broken_templates
from awq_jax.formats.checkpoint import Checkpoint, open_checkpoint
from awq_jax.formats.written import check_destination, resolved, size_of, written_whole
from awq_jax.memory import check_memory
from awq_jax.models.decoder import head
from awq_jax.models.family import is_router, matrix_shapes, param_shapes
from awq_jax.models.inputs import check_length, check_tokens, without_rows
from awq_jax.models.layer import Config
from awq_jax.pipeline.bridged import fallback
from awq_jax.pipeline.calibration_text import Read, calibration_tokens, check_sources
from awq_jax.pipeline.decoder import (
    Progress,
    as_function,
    by_layer,
    called,
    chunks,
    lazy_params,
    outer,
    read,
    stream_decoder,
)
from awq_jax.pipeline.distill_decoder import nbytes as nbytes_of_refine
from awq_jax.pipeline.distill_decoder import refine
from awq_jax.pipeline.fused import skip_whole, widening
from awq_jax.pipeline.load import architecture, load
from awq_jax.pipeline.outputs import (
    check_average,
    check_fits,
    fitted,
    for_formats,
    formats_of,
    named_failure,
    places,
    refuse_in_out,
    writer,
)
from awq_jax.pipeline.report import in_16_bits, write_report
from awq_jax.transforms import mixed_bits
from awq_jax.transforms.distill import kl_of_logits
from awq_jax.transforms.mixed_bits import Offer, allocate, with_bits
from awq_jax.transforms.quantize import SiteReport
from awq_jax.transforms.recipe import Recipe
from awq_jax.transforms.stream import Feed
from awq_jax.transforms.survey import survey
from awq_jax.weights.spec import Rule
from awq_jax.weights.tensor import LARGEST_HALF

BEFORE = "error before distillation"
SURVEYED = 512
"""Tokens on which the divergence of every group of sites is measured."""


@dataclass(frozen=True)
class Converted:
    """Where the quantized model is, its size in bytes, each site's error, seconds by stage, and what it was made with.

    Sizes are those of the source as stored, of its tensors in 16 bits, and of all files of the quantized model.
    `calibration` tells what was read of each source of text; `notes` are about the model as a whole.
    """

    path: Path
    before: int
    half: int
    after: int
    sites: tuple[SiteReport, ...]
    seconds: dict[str, float]
    recipe: Recipe
    calibration: tuple[Read, ...]
    notes: tuple[str, ...] = ()


def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    format: str | Sequence[str] = "awq",
    calib: str | Path | Sequence[str | Path] | None = None,
    samples: int | None = None,
    seq_len: int = 512,
    feed: Feed = "dense",
    average_bits: float | None = None,
    distill: int = 0,
    overwrite: bool = False,
    progress: Progress = lambda stage, done, total: None,
    told: Callable[[str], None] = lambda line: None,
) -> Converted:
    """Quantize the model at `model` into the folder `out`, which appears only when all of it is there.

    Args:
      model: Hugging Face folder or hub id, or a GGUF file.
      out: a new or empty folder, or one that this function wrote, with `overwrite`.
      recipe: None for `awq.Recipe()`; `scales` follow from the format. In all but ours a
        rule that skips one of q, k, v or of gate, up skips the others too.
      format: "awq" (AutoAWQ, for vLLM, SGLang, transformers), "compressed-tensors" (for the same, and vLLM on TPUs),
        "gptq", "gptq_v2", "mlx", or "orbax" (ours: a scale for each site). Several give a folder in `out` each, of one
        search, in which scales are folded.
      calib: see `calibration_tokens`.
      samples, seq_len: calibration sequences and their tokens; None for as many sequences as the recipe says.
      feed: whether attention and MLP of each layer are calibrated on what the dense ones before give, or the quantized
        ones.
      average_bits: choose the bits of every site so that all take so many in the mean; not in AutoAWQ files. See
        `awq_jax.transforms.mixed_bits`.
      distill: passes over the calibration text that train the steps against the dense model's logits, after the
        search. Slow without an accelerator, and the whole model must fit into memory.
      overwrite: replace what an earlier call wrote at `out`.
      progress: called with a stage, steps done and steps in all; see `awq.progress_bar`.
      told: called with a line on what was chosen and what was read.

    Raises:
      FileExistsError: `out` holds something and `overwrite` is not set, or a file that no earlier call wrote.
      InputError: anything about the input that cannot be used, before any work where that can be told before.
      ValueError: non-finite weights, or a fold that changed the function; names the site.

    Example:
      >>> awq.quantize_checkpoint("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-awq", awq.Recipe(group_size=64))
    """
    formats = formats_of(format)
    if feed not in get_args(Feed):
        raise InputError(f"feed={feed!r}: choose one of {', '.join(get_args(Feed))}.")
    clock = Clock()
    progress("loading", 0, 1)
    recipe = for_formats(recipe or Recipe(), formats)
    if samples is not None:
        recipe = replace(recipe, samples=samples)
    if average_bits is not None:
        mixed_bits.check_average(average_bits)
        check_average(formats, average_bits)
    if distill < 0:
        raise InputError(f"distill={distill}: give a number of passes, 0 for none.")
    calib = [str(source) for source in ([calib] if isinstance(calib, str | Path) else calib or ())]
    check_sources(calib, recipe.samples, seq_len)
    inputs = (model, *calib)
    check_destination(out, overwrite=overwrite, inputs=inputs)
    checkpoint = open_checkpoint(model)
    if checkpoint.kind not in ("huggingface", "gguf"):
        raise InputError(f"{model} is quantized already: start from the dense model.")
    if (other := fallback(checkpoint)) is not None:
        from awq_jax.pipeline.quantize_bridged import quantize_bridged, refuse

        refuse(formats, average_bits, distill, calib)
        return quantize_bridged(
            other,
            out,
            recipe,
            formats,
            calib=calib,
            seq_len=seq_len,
            feed=feed,
            overwrite=overwrite,
            inputs=inputs,
            clock=clock,
            progress=progress,
            told=told,
        )
    family, config = architecture(checkpoint)
    recipe.check_rules(matrix_shapes(config))
    recipe = routers_skipped(recipe, config)
    fused = family.fused(config) if recipe.folds else {}
    recipe, with_skipped = skip_whole(recipe, fused)
    if recipe.group_size is None:
        recipe, why = fitted(recipe, matrix_shapes(config), formats)
        told(why)
    refuse_in_out(model, family, formats)
    check_fits(formats, matrix_shapes(config), recipe, fused)
    check_length(config, seq_len, f"seq_len={seq_len}")
    if distill:
        # Folds are put into float32.
        wider = jnp.float32 if recipe.folds else None
        dense = lambda w: jax.ShapeDtypeStruct(w.shape, wider or w.dtype)
        needed = nbytes_of_refine(
            config, jax.tree.map(dense, checkpoint.shapes(family, config)), recipe.samples, seq_len
        )
        check_memory(f"distill={distill} with seq_len={seq_len}", needed, "leave it out, or give shorter sequences")
    with written_whole(out, overwrite=overwrite, inputs=inputs) as scratch:
        own = lambda samples, seq_len: load(model).sample(samples, seq_len)
        tokens, sources = text_for(
            checkpoint, config, calib, recipe.samples, seq_len, own, clock=clock, progress=progress, told=told
        )
        params = lazy_params(checkpoint, family, config, wide=recipe.folds)
        if average_bits is not None:
            offered = offers(config, params, tokens, recipe, progress)
            recipe = with_bits(recipe, allocate(offered, average_bits))
            clock.rest("survey")
        folders = places(formats, scratch)
        writers = [
            [named_failure(out, f) for f in writer(name, place, checkpoint, family, recipe, fused)]
            for name, place in folders.items()
        ]

        def write(part: str, params: Any) -> None:
            for each, _ in writers:
                each(part, params)

        parts: dict[str, Any] = {}
        take = parts.__setitem__ if distill else write
        for part, whole in outer(lazy_params(checkpoint, family, config)).items():
            with clock("load"):
                whole = read(whole)
            with clock("write"):
                take(part, whole)
            del whole
        options = {"feed": feed, "clock": clock, "progress": progress}
        done = stream_decoder(config, params, tokens, recipe, take, **options)
        if distill:
            before = tuple(replace(r, note="; ".join(filter(None, (r.note, BEFORE)))) for r in done.reports)
            done = replace(done, reports=before)
            with clock("distillation"):
                parts = refine(config, params, parts, tokens, passes=distill, progress=progress)
            with clock("write"):
                for part, tuned in parts.items():
                    write(part, tuned)
        dtype, notes = computed_in(done.largest)
        for _, finish in writers:
            finish(dtype)
        done = replace(done, reports=(*done.reports, *with_skipped))
        more = {"distilled": f"{distill} passes over them; the errors are those before"} if distill else {}
        write_report(folders, checkpoint, recipe, done.reports, tokens, more)
    after = size_of(resolved(out))
    clock.rest("write")
    notes = (*widening(with_skipped), *(notes if recipe.folds else ()))
    half = in_16_bits(checkpoint)
    return Converted(Path(out), checkpoint.nbytes, half, after, done.reports, clock.seconds, recipe, sources, notes)


def text_for(
    checkpoint: Checkpoint,
    config: Any,
    calib: Sequence[str],
    samples: int,
    seq_len: int,
    own: Callable[[int, int], Int[np.ndarray, "n t"]] | None,
    *,
    clock: Clock,
    progress: Progress,
    told: Callable[[str], None],
) -> tuple[Int[np.ndarray, "n t"], tuple[Read, ...]]:
    """The calibration tokens of a model, and what was read of their sources, which is told.

    Args:
      config: has `vocab`, `positions` and `dtype`.
      calib, samples, seq_len, own: see `calibration_tokens`.
    """
    tokenizer, _ = checkpoint.tokenizer(), checkpoint.companions  # Raises where one of them is unsound.
    if beyond := without_rows(config, tokenizer):
        told(beyond)
    for broken in broken_templates(checkpoint.tokenizer_files):
        told(broken)
    clock.rest("load")
    progress("loading", 1, 1)
    progress("calibration text", 0, 1)
    sources: list[Read] = []
    options: Any = {"samples": samples, "seq_len": seq_len, "own": own, "told": sources.append}
    tokens = calibration_tokens(calib or None, tokenizer, **options)
    check_tokens(config, tokens, "the calibration text")
    for source in sources:
        told(str(source))
    clock.rest("text")
    progress("calibration text", 1, 1)
    return tokens, tuple(sources)


def routers_skipped(recipe: Recipe, config: Config) -> Recipe:
    """`recipe` with the matrices that choose experts left dense."""
    names = [re.escape(path) for path in param_shapes(config) if is_router(path)]
    return replace(recipe, rules=(*recipe.rules, Rule(f"^({'|'.join(names)})$", skip=True))) if names else recipe


def offers(config: Config, params: Any, tokens: Any, recipe: Recipe, progress: Progress) -> list[Offer]:
    """The divergence of the model with every group of sites quantized alone, on SURVEYED tokens of the first sequence.

    Args:
      params: lazy.
    """
    # Computed in the model's dtype throughout: what a group changes may be less than faster ones round.
    fn, given, tokens = as_function(config, params, tokens)
    first = (jnp.asarray(tokens[:1, :SURVEYED]),)
    sink = by_layer(params, lambda part, layer: None, progress, "block looked at")
    (exact,), found = survey(fn, given, [first, *chunks(tokens[1:])], recipe, sink, called=called(tokens))
    rest = read(outer(params))
    logits_of = jax.jit(lambda hidden: head(config, rest, hidden))
    offered, logits = [], logits_of(exact)
    for k, (group, (changed,)) in enumerate(found, 1):
        offered.append(Offer.of(group, kl_of_logits(logits, logits_of(changed))))
        progress("group scored", k, len(found))
    return offered


def computed_in(largest: float) -> tuple[str, tuple[str, ...]]:
    """The dtype in which a model with such activations is to be computed, float16 if it has room for twice as large
    ones; and what is to be said of it.
    """
    if 2 * largest <= LARGEST_HALF:
        return "float16", ()
    note = f"Activations reach {largest:.0f} on the calibration text, float16 ends at {LARGEST_HALF:.0f}"
    return "bfloat16", (f"{note}: config.json says bfloat16, do not run the model in float16.",)

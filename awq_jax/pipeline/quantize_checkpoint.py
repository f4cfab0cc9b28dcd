"""`quantize_checkpoint`: a model on disk to a quantized model on disk, block by block."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.clock import Clock
from awq_jax.errors import InputError, one_line
from awq_jax.formats import autoawq, orbax
from awq_jax.formats.card import CARD, card
from awq_jax.formats.checkpoint import Checkpoint, open_checkpoint
from awq_jax.formats.written import check_destination, resolved, size_of, written_whole
from awq_jax.memory import check_memory, size
from awq_jax.models.decoder import head
from awq_jax.models.family import Family, is_router, matrix_shapes, param_shapes
from awq_jax.models.inputs import check_length, check_tokens, without_rows
from awq_jax.models.layer import Config
from awq_jax.pipeline.calibration_text import Read, calibration_tokens
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
from awq_jax.pipeline.fused import Fused, left_whole, skip_whole, widening
from awq_jax.pipeline.load import architecture, load
from awq_jax.transforms.distill import kl_of_logits
from awq_jax.transforms.finite import require_finite_weights
from awq_jax.transforms.mixed_bits import Offer, allocate, check_average, with_bits
from awq_jax.transforms.quantize import SiteReport
from awq_jax.transforms.recipe import GROUPS, Recipe
from awq_jax.transforms.stream import Feed
from awq_jax.transforms.survey import survey
from awq_jax.weights.spec import Rule
from awq_jax.weights.tensor import LARGEST_HALF, is_quantized

Format = Literal["awq", "orbax"]
REPORT = "quantization_report.json"
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
    format: Format = "awq",
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
      recipe: None for `awq.Recipe()`; `fold` and `input_scales` follow from the format. In an AutoAWQ folder a
        rule that skips one of q, k, v or of gate, up skips the others too.
      format: "awq" (AutoAWQ, for vLLM, SGLang, transformers) or "orbax" (ours: a scale for each site).
      calib: see `calibration_tokens`.
      samples, seq_len: calibration sequences and their tokens; None for as many sequences as the recipe says.
      feed: whether attention and MLP of each layer are calibrated on what the dense ones before give, or the quantized
        ones.
      average_bits: choose the bits of every site so that all take so many in the mean; orbax only. See
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
    for name, chosen, known in (("format", format, get_args(Format)), ("feed", feed, get_args(Feed))):
        if chosen not in known:
            raise InputError(f"{name}={chosen!r}: choose one of {', '.join(known)}.")
    clock = Clock()
    progress("loading", 0, 1)
    recipe = replace(recipe or Recipe(), fold=format == "awq", input_scales=format != "awq")
    if samples is not None:
        recipe = replace(recipe, samples=samples)
    if average_bits is not None:
        check_average(average_bits)
    if distill < 0:
        raise InputError(f"distill={distill}: give a number of passes, 0 for none.")
    if average_bits is not None and format == "awq":
        raise InputError(f"{average_bits} bits on average: an AutoAWQ file has one width, use format='orbax'.")
    calib = [str(source) for source in ([calib] if isinstance(calib, str | Path) else calib or ())]
    inputs = (model, *calib)
    check_destination(out, overwrite=overwrite, inputs=inputs)
    checkpoint = open_checkpoint(model)
    if checkpoint.kind in ("autoawq", "orbax"):
        raise InputError(f"{model} is quantized already: start from the dense model.")
    family, config = architecture(checkpoint)
    recipe.check_rules(matrix_shapes(config))
    recipe = routers_skipped(recipe, config)
    fused = family.fused(config) if format == "awq" else {}
    recipe, with_skipped = skip_whole(recipe, fused)
    if recipe.group_size is None:
        recipe, why = fitted(recipe, matrix_shapes(config), format)
        told(why)
    if format == "awq" and family.in_out:
        raise InputError(
            f"{model}: readers of AutoAWQ files replace linear layers only, and those of {family.architectures[0]} are "
            "stored the other way round (Conv1D): write format='orbax'."
        )
    check_fits(config, recipe, format)
    check_length(config, seq_len, f"seq_len={seq_len}")
    if distill:
        # Folds are put into float32.
        wider = jnp.float32 if recipe.fold else None
        dense = lambda w: jax.ShapeDtypeStruct(w.shape, wider or w.dtype)
        needed = nbytes_of_refine(
            config, jax.tree.map(dense, checkpoint.shapes(family, config)), recipe.samples, seq_len
        )
        check_memory(f"distill={distill} with seq_len={seq_len}", needed, "leave it out, or give shorter sequences")
    half = sum(2 * math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    with written_whole(out, overwrite=overwrite, inputs=inputs) as scratch:
        tokenizer, _ = checkpoint.tokenizer(), checkpoint.companions  # Raises where one of them is unsound.
        if beyond := without_rows(config, tokenizer):
            told(beyond)
        clock.rest("load")
        progress("loading", 1, 1)
        progress("calibration text", 0, 1)
        own = lambda samples, seq_len: load(model).sample(samples, seq_len)
        sources: list[Read] = []
        options: Any = {"samples": recipe.samples, "seq_len": seq_len, "own": own, "told": sources.append}
        tokens = calibration_tokens(calib or None, tokenizer, **options)
        check_tokens(config, tokens, "the calibration text")
        for source in sources:
            told(str(source))
        clock.rest("text")
        progress("calibration text", 1, 1)
        params = lazy_params(checkpoint, family, config, wide=recipe.fold)
        if average_bits is not None:
            offered = offers(config, params, tokens, recipe, progress)
            recipe = with_bits(recipe, allocate(offered, average_bits))
            clock.rest("survey")
        write, finish = (named_failure(out, f) for f in writer(format, scratch, checkpoint, family, recipe, fused))
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
        finish(dtype)
        done = replace(done, reports=(*done.reports, *with_skipped))
        (scratch / REPORT).write_text(json.dumps([asdict(site) for site in done.reports], indent=1))
        sizes = {
            "size before": f"{size(checkpoint.nbytes)} ({size(half)} in 16 bits)",
            "size now": size(size_of(scratch)),
            "calibrated on": f"{len(tokens)} sequences of {np.shape(tokens)[1]} tokens",
        }
        if distill:
            sizes["distilled"] = f"{distill} passes over them; the errors are those before"
        text = card(checkpoint.path, format, orbax.shown(recipe), sizes, done.reports)
        (scratch / CARD).write_text(text, "utf-8")
    after = size_of(resolved(out))
    clock.rest("write")
    notes = (*widening(with_skipped), *(notes if format == "awq" else ()))
    read_all = tuple(sources)
    return Converted(Path(out), checkpoint.nbytes, half, after, done.reports, clock.seconds, recipe, read_all, notes)


def routers_skipped(recipe: Recipe, config: Config) -> Recipe:
    """`recipe` with the matrices that choose experts left dense."""
    names = [re.escape(path) for path in param_shapes(config) if is_router(path)]
    return replace(recipe, rules=(*recipe.rules, Rule(f"^({'|'.join(names)})$", skip=True))) if names else recipe


def fitted(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]], format: Format) -> tuple[Recipe, str]:
    """`recipe` with the largest group size that divides the inputs of all its sites, and a line that says so."""
    rules = ((recipe.rule_of(name), i) for name, (*_, i, _) in shapes.items())
    widths = sorted({i for rule, i in rules if rule is None or not (rule.skip or rule.group_size)})
    known, all_ = ", ".join(map(str, GROUPS)), ", ".join(map(str, widths))
    group = next((g for g in GROUPS if all(i % g == 0 for i in widths)), None)
    if group is None and format == "awq":
        raise InputError(
            f"No group size of {known} divides all widths ({all_}), as AutoAWQ files need: leave sites dense "
            "(skip=True in a rule), or write format='orbax', which pads."
        )
    if group is None:
        return replace(recipe, group_size=GROUPS[0]), f"Groups of {GROUPS[0]}, padded: none of {known} divides {all_}."
    return replace(recipe, group_size=group), f"Groups of {group}: the largest of {known} that divides {all_}."


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


def writer(
    format: Format, folder: Path, checkpoint: Checkpoint, family: Family, recipe: Recipe, fused: Fused
) -> tuple[Callable[[str, Any], None], Callable[[str], None]]:
    """`(write(part, params), finish(dtype))` of a format; ours is read in any dtype."""
    kept: orbax.Writer | autoawq.Writer
    if format == "orbax":
        kept = own = orbax.Writer(folder, checkpoint, recipe)
        named = lambda part, params: halved(params) if checkpoint.kind == "gguf" else params
        finish: Callable[[str], None] = lambda dtype: own.finish()
    else:
        kept = theirs = autoawq.Writer(folder, checkpoint, recipe.spec, left_whole(recipe, fused))
        named, finish = lambda part, params: family.to_names({part: params}), theirs.finish

    def write(part: str, params: Any) -> None:
        # What stays dense is not seen by any search, which would refuse it.
        require_finite_weights(params, f"{part}/")
        kept.write(part, named(part, params))

    return write, finish


def computed_in(largest: float) -> tuple[str, tuple[str, ...]]:
    """The dtype in which a model with such activations is to be computed, float16 if it has room for twice as large
    ones; and what is to be said of it.
    """
    if 2 * largest <= LARGEST_HALF:
        return "float16", ()
    note = f"Activations reach {largest:.0f} on the calibration text, float16 ends at {LARGEST_HALF:.0f}"
    return "bfloat16", (f"{note}: config.json says bfloat16, do not run the model in float16.",)


def halved(params: Any) -> Any:
    """Matrices that stay dense in float16, where it holds them: a GGUF gives float32 for what it stores in less.

    Held are rows of which no weight changes by more than float16's precision of the largest.
    """

    def half(w: Any) -> Any:
        if is_quantized(w) or w.ndim < 2:
            return w
        small = jnp.asarray(w).astype(jnp.float16)
        eps = float(jnp.finfo(jnp.float16).eps)
        fits = (jnp.abs(small.astype(w.dtype) - w).max(-1) <= eps * jnp.abs(w).max(-1)).all()
        return small if fits else w

    return jax.tree.map(half, params, is_leaf=is_quantized)


def named_failure(out: str | Path, f: Callable[..., None]) -> Callable[..., None]:
    """`f`, its errors as one that says where they happened: what a full disk raises depends on the library."""

    def run(*args: Any) -> None:
        try:
            f(*args)
        except InputError:
            raise
        except (OSError, ValueError) as e:
            reason = one_line(e, 2000)
            advice = ": free space or choose another disk" if "no space" in reason.lower() else ""
            raise OSError(f"{out} could not be written ({reason}){advice}.") from e

    return run


def check_fits(config: Config, recipe: Recipe, format: Format) -> None:
    """Refuse, before any work, widths that the format cannot hold."""
    if format != "awq":
        return
    for name, (*_, i, o) in matrix_shapes(config).items():
        if (spec := recipe.spec_of(name)) is not None:
            autoawq.check_fits(name, i, o, spec)
            if (spec.bits, spec.group_size) != (recipe.bits, recipe.group_size):
                raise InputError(
                    f"{name}: a rule gives it {spec.bits} bits in groups of {spec.group_size}, but an AutoAWQ file has "
                    f"one of each ({recipe.bits}, {recipe.group_size}): skip the site, or write format='orbax'."
                )

"""A checkpoint of any model of transformers to a quantized one, through transformers' own code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from awq_jax.clock import Clock
from awq_jax.errors import InputError
from awq_jax.formats.codecs import WRITTEN
from awq_jax.formats.quantized_writer import Writer
from awq_jax.formats.written import resolved, size_of, written_whole
from awq_jax.models.inputs import check_length
from awq_jax.pipeline.bridged import Bridged, for_readers, sites_of, sizes
from awq_jax.pipeline.decoder import Progress, called, chunks
from awq_jax.pipeline.outputs import OURS, codecs_of, fitted, named_failure, places
from awq_jax.pipeline.quantize_checkpoint import Converted, computed_in, text_for
from awq_jax.pipeline.report import in_16_bits, write_report
from awq_jax.tracing.segments import segments
from awq_jax.transforms.finite import require_finite_weights
from awq_jax.transforms.recipe import Recipe, some
from awq_jax.transforms.stream import Feed, stream


def quantize_bridged(
    found: Bridged,
    out: str | Path,
    recipe: Recipe,
    formats: Sequence[str],
    *,
    calib: Sequence[str],
    seq_len: int,
    feed: Feed,
    overwrite: bool,
    inputs: Sequence[str | Path],
    clock: Clock,
    progress: Progress,
    told: Callable[[str], None],
) -> Converted:
    """As `quantize_checkpoint`, in formats other than ours; the head and what tokens alone do not reach stay dense."""
    checkpoint, config = found.checkpoint, sizes(found)
    told(f"Computed by transformers' {found.model.name}, traced.")
    check_length(config, seq_len, f"seq_len={seq_len}")
    with written_whole(out, overwrite=overwrite, inputs=inputs) as scratch:
        tokens, sources = text_for(
            checkpoint, config, calib, recipe.samples, seq_len, _no_own_text, clock=clock, progress=progress, told=told
        )
        with clock("trace"):
            batches = chunks(tokens)
            fn, params = found.model.hidden(batches[0][0].shape), found.lazy_params()
            sites = sites_of(segments(fn, params, *batches[0]))
        recipe, gates = for_readers(recipe, sites, found, codecs_of(formats))
        if gates:
            told(f"{len(gates)} sites of few outputs, such as gates, stay dense: {some(gates)}.")
        if recipe.group_size is None:
            chosen = {name: (s.in_features, s.out_features) for name, s in sites.items() if not s.kept}
            recipe, why = fitted(recipe, chosen, formats)
            told(why)
        folders = places(formats, scratch)
        writers = [Writer(WRITTEN[name], place, checkpoint, recipe.spec) for name, place in folders.items()]

        def write_all(part: str, tensors: dict[str, Any]) -> None:
            for writer in writers:
                writer.write(part, tensors)

        write_all = named_failure(out, write_all)

        def write(name: str, leaf: Any) -> None:
            require_finite_weights({name: leaf}, "")
            write_all(name, found.tensors(name, leaf))

        options = {"feed": feed, "clock": clock, "called": called(tokens), "progress": progress}
        done = stream(fn, params, batches, recipe, write, **options)
        write_all("left over", {name: checkpoint.read(name) for name in found.left_over()})
        dtype, notes = computed_in(done.largest)
        for writer in writers:
            named_failure(out, writer.finish)(dtype)
        write_report(folders, checkpoint, recipe, done.reports, tokens, {})
    after = size_of(resolved(out))
    clock.rest("write")
    half = in_16_bits(checkpoint)
    return Converted(Path(out), checkpoint.nbytes, half, after, done.reports, clock.seconds, recipe, sources, notes)


def refuse(formats: Sequence[str], average_bits: float | None, distill: int) -> None:
    """Refuse what only a model of awq_jax.models can do."""
    for option, asked in (
        (f"format={OURS!r}", OURS in formats),
        (f"average_bits={average_bits}", average_bits is not None),
        (f"distill={distill}", distill > 0),
    ):
        if asked:
            raise InputError(
                f"{option}: not for models that transformers' code computes, which become folders for servers: leave "
                "it out, or use awq.from_torch, of whose params anything can be made."
            )


def _no_own_text(samples: int, seq_len: int) -> Any:
    raise InputError("calib='self': a model that transformers' code computes writes no text of its own: give a text.")

"""A checkpoint of any model of transformers to a quantized one, through transformers' own code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from awq_jax.clock import Clock
from awq_jax.errors import InputError
from awq_jax.formats.codecs import WRITTEN
from awq_jax.formats.quantized_writer import Writer
from awq_jax.formats.written import resolved, size_of, written_whole
from awq_jax.models.inputs import check_length
from awq_jax.pipeline.bridged import Bridged, gates_skipped, matrices, no_own_text, sites_of, sizes
from awq_jax.pipeline.decoder import Progress, called, chunks, rows_at_once
from awq_jax.pipeline.fused import fused_by_name, left_whole, skip_whole, widening
from awq_jax.pipeline.outputs import OURS, check_fits, fitted, in_out_refused, named_failure, places
from awq_jax.pipeline.quantize_checkpoint import Converted, computed_in, text_for
from awq_jax.pipeline.report import in_16_bits, write_report
from awq_jax.tracing.segments import segments
from awq_jax.transforms.finite import require_finite_weights
from awq_jax.transforms.recipe import Recipe, some
from awq_jax.transforms.stream import Feed, check_recipe, stream


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
    told(f"{found}.")
    check_length(config, seq_len, f"seq_len={seq_len}")
    fn, params = found.model.hidden, found.lazy_params()
    with clock("trace"):
        rows = min(recipe.samples, rows_at_once(seq_len))
        traced = segments(fn, params, jax.ShapeDtypeStruct((rows, seq_len), jnp.int32))
    check_recipe(recipe, traced)
    sites = sites_of(traced)
    recipe, gates = gates_skipped(recipe, sites)
    if gates:
        told(f"{len(gates)} sites of few outputs, such as gates, stay dense: {some(gates)}.")
    fused = fused_by_name({name: [place.name for place in found.places[name]] for name in sites})
    recipe, with_skipped = skip_whole(recipe, fused)
    shapes = matrices(found, sites, recipe)
    if recipe.group_size is None:
        recipe, why = fitted(recipe, shapes, formats)
        told(why)
    check_fits(formats, shapes, recipe, fused)
    if any(map(found.model.is_transposed, shapes)):
        remedy = "quantize what awq.from_torch gives, whose params no server has to read"
        raise in_out_refused(checkpoint.path, found.model.name, formats, remedy)
    with written_whole(out, overwrite=overwrite, inputs=inputs) as scratch:
        tokens, sources = text_for(
            checkpoint, config, calib, recipe.samples, seq_len, None, clock=clock, progress=progress, told=told
        )
        folders = places(formats, scratch)
        whole = left_whole(recipe, fused)
        writers = [Writer(WRITTEN[name], place, checkpoint, recipe.spec, whole) for name, place in folders.items()]

        def write_all(part: str, tensors: dict[str, Any]) -> None:
            for writer in writers:
                writer.write(part, tensors)

        write_all = named_failure(out, write_all)

        def write(name: str, leaf: Any) -> None:
            require_finite_weights({name: leaf}, "")
            write_all(name, found.tensors(name, leaf))

        options = {"feed": feed, "clock": clock, "called": called(tokens), "progress": progress}
        done = stream(fn, params, chunks(tokens), recipe, write, **options)
        done = replace(done, reports=(*done.reports, *with_skipped))
        write_all("left over", {name: checkpoint.read(name) for name in found.left_over()})
        dtype, notes = computed_in(done.largest)
        for writer in writers:
            named_failure(out, writer.finish)(dtype)
        write_report(folders, checkpoint, recipe, done.reports, tokens, {})
    after = size_of(resolved(out))
    clock.rest("write")
    notes, half = (*widening(with_skipped), *notes), in_16_bits(checkpoint)
    return Converted(Path(out), checkpoint.nbytes, half, after, done.reports, clock.seconds, recipe, sources, notes)


def refuse(formats: Sequence[str], average_bits: float | None, distill: int, calib: Sequence[str]) -> None:
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
    if "self" in calib:
        raise no_own_text()

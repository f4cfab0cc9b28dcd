"""`survey`: what a function gives with each group of sites quantized alone, while memory holds a part of the params."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain
from typing import Any

import jax
from jaxtyping import Array

from awq_jax.tracing.live import Live
from awq_jax.tracing.segments import segments
from awq_jax.transforms.calibrate import Calibration
from awq_jax.transforms.mixed_bits import Group, quantized_alone
from awq_jax.transforms.recipe import Recipe
from awq_jax.transforms.stream import BUDGET, needed_after, own_names, stream


def survey(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    recipe: Recipe,
    write: Callable[[str, Any], None] = lambda name, leaf: None,
    **options: Any,
) -> tuple[list[Array], list[tuple[Group, list[Array]]]]:
    """The outputs for the first batch, and for each group of sites those with nothing but that group quantized.

    The function streams once. What each group does to the first batch goes on through the segments that follow, beside
    what the others did.

    Args:
      fn, params, batches, options: as for `stream`; all batches give statistics.
      write: called with the params as they were.
    """
    first, *rest = batches
    found = segments(fn, params, *first)
    outputs = {v: None for v in found.outputs if v in {w for s in found.segments for w in s.writes}}
    todo = iter(zip(found.segments, (wanted for (wanted,) in needed_after([found])), strict=True))
    exact = Live(BUDGET)
    exact.put(found.inputs, jax.tree.leaves(first))
    alone: list[tuple[Group, Live]] = []

    def look(stored: Any, calibration: Calibration, recipe: Recipe) -> tuple[Any, tuple[()]]:
        segment, wanted = next(todo)
        run = jax.jit(calibration.fn)

        def passed(params: Any, live: Live) -> Live:
            after = Live(BUDGET, dict(live.arrays))
            after.put(segment.writes, run(params, *live.get(segment.reads)))
            after.keep({*wanted, *outputs})
            return after

        new = [(group, passed(changed, exact)) for group, changed in quantized_alone(stored, calibration, recipe)]
        own = lambda group: replace(group, sites=tuple(own_names(name, segment) for name in group.sites))
        alone[:] = [(group, passed(stored, live)) for group, live in alone] + [(own(g), live) for g, live in new]
        exact.arrays = passed(stored, exact).arrays
        return stored, ()

    stream(fn, params, chain([first], rest), recipe, write, solve=look, **options)
    of = lambda live: live.get(list(outputs))
    return of(exact), [(group, of(live)) for group, live in alone]

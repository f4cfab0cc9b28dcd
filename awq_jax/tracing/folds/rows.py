"""Rules of what moves rows (tokens) about: gathered, scattered or sorted, their channels keep their scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from awq_jax.tracing.folds.rules import Rule, rule
from awq_jax.tracing.folds.unknowns import Ids, Value, Walk, spread


def partial_axes(whole: Sequence[int], part: Sequence[int]) -> list[int]:
    """Where a part of a value is smaller than the value."""
    return [k for k, (n, m) in enumerate(zip(whole, part, strict=True)) if n != m]


NONE = slice(0, 0)


def of_rows(*names: str, places: slice = NONE) -> Callable[[Rule], Rule]:
    """`rule` for the operands that are rows; nothing is known where they are a param (an embedding that is looked up).

    Args:
      places: which operands say where, and must stay as they are.
    """

    def register(f: Rule) -> Rule:
        @rule(*names)
        def guarded(walk: Walk, out: tuple, *xs: Value, primitive: str, **p: Any) -> list[Value]:
            where = range(len(xs))[places]
            rows = [x for k, x in enumerate(xs) if k not in where]
            is_lookup = any(x.param is not None for x in rows)
            walk.freeze([t for x in (xs if is_lookup else xs[places]) for t in x.terms], primitive)
            return [Value(shape) for shape in out] if is_lookup else f(walk, out, *rows, primitive=primitive, **p)

        return guarded

    return register


@of_rows("sort")
def _sort(walk: Walk, out: tuple, *xs: Value, dimension: int, primitive: str, **_: Any) -> list[Value]:
    return [Value(s, walk.freeze_along([dimension], x.terms, primitive)) for s, x in zip(out, xs, strict=True)]


@of_rows("cumsum", "cummax", "cummin")
def _cumulate(walk: Walk, out: tuple, x: Value, *, axis: int, primitive: str, **_: Any) -> list[Value]:
    return [Value(out[0], walk.freeze_along([axis], x.terms, primitive))]


@of_rows("dynamic_slice", places=slice(1, None))
def _dynamic_slice(walk: Walk, out: tuple, x: Value, primitive: str, **_: Any) -> list[Value]:
    return [Value(out[0], walk.freeze_along(partial_axes(x.shape, out[0]), x.terms, primitive))]


@of_rows("dynamic_update_slice", places=slice(2, None))
def _dynamic_update_slice(walk: Walk, out: tuple, x: Value, part: Value, primitive: str, **_: Any) -> list[Value]:
    cut = partial_axes(x.shape, part.shape)
    kept, put = (walk.freeze_along(cut, v.terms, primitive) for v in (x, part))
    return _put(walk, out, x, kept, part, put, primitive)


@of_rows("gather", places=slice(1, None))
def _gather(
    walk: Walk, out: tuple, x: Value, *, dimension_numbers: Any, slice_sizes: Any, primitive: str, **p: Any
) -> list[Value]:
    n = dimension_numbers
    filler = p.get("fill_value")
    if filler is not None and filler != 0 and not np.isnan(filler):
        walk.freeze(x.terms, primitive)
        return [Value(out[0])]
    window = [k for k in range(len(x.shape)) if k not in (*n.collapsed_slice_dims, *n.operand_batching_dims)]
    terms = walk.freeze_along(partial_axes(x.shape, slice_sizes), x.terms, primitive)
    return [Value(out[0], tuple(spread(t, window, n.offset_dims, len(out[0])) for t in terms))]


@of_rows("scatter", "scatter-add", "scatter-sub", "scatter-min", "scatter-max", places=slice(1, 2))
def _scatter(
    walk: Walk,
    out: tuple,
    x: Value,
    rows: Value,
    *,
    dimension_numbers: Any,
    update_jaxpr: Any,
    primitive: str,
    **_: Any,
) -> list[Value]:
    n, ndim = dimension_numbers, len(x.shape)
    if primitive == "scatter" and update_jaxpr is not None and update_jaxpr.eqns:
        # x.at[rows].apply(f)
        walk.freeze((*x.terms, *rows.terms), primitive)
        return [Value(out[0])]
    window = [k for k in range(ndim) if k not in (*n.inserted_window_dims, *n.operand_batching_dims)]
    matched = dict(zip(window, n.update_window_dims, strict=True))
    whole = [k for k, j in matched.items() if x.shape[k] == rows.shape[j]]
    others = lambda axes, ndim: [k for k in range(ndim) if k not in axes]
    kept = walk.freeze_along(others(whole, ndim), x.terms, primitive)
    theirs = [matched[k] for k in whole]
    put = walk.freeze_along(others(theirs, len(rows.shape)), rows.terms, primitive)
    return _put(walk, out, x, kept, rows, tuple(spread(t, theirs, whole, ndim) for t in put), primitive)


def _put(
    walk: Walk, out: tuple, x: Value, kept: tuple[Ids, ...], rows: Value, put: tuple[Ids, ...], primitive: str
) -> list[Value]:
    """`rows` written into x, or added to it: zeros take any scale, else both have the same."""
    if x.constant == 0 or rows.constant == 0:
        return [Value(out[0], put if x.constant == 0 else kept)]
    return [Value(out[0], walk.equal(kept, put, f"{primitive} into other rows"))]

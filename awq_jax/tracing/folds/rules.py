"""What each primitive does to the unknown scales of its operands, control flow apart (see solve.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from awq_jax.kernels.partitioning import names_of
from awq_jax.tracing.folds.unknowns import Dot, Ids, Scaled, Value, Walk, collapsed, spread, varies
from awq_jax.tracing.primitives import MATMULS, STRUCTURAL, Matmul, matmul
from awq_jax.weights.layout import Layout, in_param

Rule = Callable[..., list[Value]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(f: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, f))
        return f

    return register


def map_terms(value: Value, shape: tuple[int, ...], f: Callable[[Ids], Ids]) -> Value:
    return Value(shape, tuple(f(t) for t in value.terms))


def moved(value: Value, primitive: str, p: Any) -> tuple[Ids, ...]:
    """The terms of what a structural primitive makes of a value."""
    return tuple(STRUCTURAL[primitive](Scaled(t, value.shape), p).ids for t in value.terms)


@rule(*(STRUCTURAL.keys() - {"slice"}))
def _structural(walk: Walk, out: tuple, x: Value, *_: Value, primitive: str, **p: Any) -> list[Value]:
    (shape,) = out
    if x.terms and not jnp.issubdtype(p.get("new_dtype", jnp.float32), jnp.inexact):
        walk.freeze(x.terms, f"rounded to {jnp.dtype(p['new_dtype']).name}")
        return [Value(shape)]
    view, terms = STRUCTURAL[primitive](x.view, p) if x.view is not None else None, moved(x, primitive, p)
    if view is None:
        walk.use(x, primitive)
        return [Value(shape, terms, constant=x.constant, product_of=x.product_of)]
    return [Value(shape, terms, x.root, view, x.param, x.constant, x.product_of)]


@rule("mul")
def _mul(walk: Walk, out: tuple, x: Value, y: Value, **_: Any) -> list[Value]:
    product_of = x.product_of if y.constant is not None else y.product_of if x.constant is not None else None
    return [Value(out[0], walk.alive(x.terms + y.terms), product_of=product_of)]


@rule("div")
def _div(walk: Walk, out: tuple, x: Value, y: Value, **_: Any) -> list[Value]:
    return [Value(out[0], walk.alive(x.terms + tuple(-t for t in y.terms)))]


@rule("neg", "real", "reduce_precision", "optimization_barrier")
def _same(walk: Walk, out: tuple, *xs: Value, **_: Any) -> list[Value]:
    return [Value(shape, x.terms) for shape, x in zip(out, xs, strict=True)]


@rule("add", "sub", "add_any")
def _add(walk: Walk, out: tuple, x: Value, y: Value, primitive: str, **_: Any) -> list[Value]:
    for a, b in ((x, y), (y, x)):
        if b.constant == 0:
            return [Value(out[0], a.terms)]
        if a.param is not None and b.constant is not None and (primitive != "sub" or a is x):
            offset = b.constant if primitive != "sub" else -b.constant
            if walk.offsets.setdefault(a.param, offset) == offset:
                return [Value(out[0], a.terms)]
    return [Value(out[0], walk.equal(x.terms, y.terms, "added to another branch (residual)"))]


@rule("max", "min")
def _max(walk: Walk, out: tuple, x: Value, y: Value, **p: Any) -> list[Value]:
    if 0 in (x.constant, y.constant):
        return [Value(out[0], y.terms if x.constant == 0 else x.terms)]
    return [Value(out[0], walk.equal(x.terms, y.terms, p["primitive"]))]


@rule("gt", "ge", "lt", "le")
def _compare(walk: Walk, out: tuple, x: Value, y: Value, **p: Any) -> list[Value]:
    if 0 not in (x.constant, y.constant):
        walk.equal(x.terms, y.terms, p["primitive"])
    return [Value(out[0])]


@rule("select_n")
def _select(walk: Walk, out: tuple, which: Value, *cases: Value, **_: Any) -> list[Value]:
    walk.freeze(which.terms, "select_n")
    live = [c for c in cases if c.constant != 0]
    terms = live[0].terms if live else ()
    for case in live[1:]:
        terms = walk.equal(terms, case.terms, "select_n")
    return [Value(out[0], terms)]


@rule("all_gather")
def _all_gather(walk: Walk, out: tuple, x: Value, all_gather_dimension: int, tiled: bool, **p: Any) -> list[Value]:
    k = all_gather_dimension
    if not tiled:
        walk.freeze(x.terms, "all_gather")
        walk.use(x, "all_gather")
        return [Value(out[0])]
    terms = walk.freeze_along([k], x.terms, "all_gather")
    in_groups = p["axis_index_groups"] is not None
    view = None if x.view is None or in_groups else x.view.gather(k, names_of(p["axis_name"]))
    if x.param is not None and view is not None:
        return [Value(out[0], terms, x.root, view, x.param)]
    walk.use(x, "all_gather")
    return [Value(out[0], terms)]


@rule("slice")
def _slice(walk: Walk, out: tuple, x: Value, primitive: str, **p: Any) -> list[Value]:
    picked = STRUCTURAL[primitive](x.view, p) if x.param is not None and x.view is not None else None
    if x.param is None or picked is None:
        return [Value(out[0], moved(x, primitive, p))]
    walk.freeze(x.terms, "sliced layer by layer")
    walk.found.setdefault(x.param, ())
    return [Value(out[0], (), x.root, picked, x.param)]


@rule("split")
def _split(walk: Walk, out: tuple, x: Value, sizes: Any, axis: int, **_: Any) -> list[Value]:
    ends = np.cumsum([0, *sizes])

    def part(a: int, b: int) -> Callable[[Ids], Ids]:
        return lambda t: np.take(t, range(a, b), axis) if t.shape[axis] > 1 else t

    return [map_terms(x, s, part(a, b)) for s, a, b in zip(out, ends[:-1], ends[1:], strict=True)]


@rule("concatenate")
def _concatenate(walk: Walk, out: tuple, *xs: Value, dimension: int, **_: Any) -> list[Value]:
    terms = []
    for k in range(max(len(x.terms) for x in xs)):
        parts = [x.terms[k] if k < len(x.terms) else np.zeros((1,) * len(x.shape), np.int32) for x in xs]
        common = [max(ns) for ns in zip(*(t.shape for t in parts), strict=True)]
        full = [
            np.broadcast_to(t, [x.shape[d] if d == dimension else n for d, n in enumerate(common)])
            for x, t in zip(xs, parts, strict=True)
        ]
        terms.append(collapsed(np.concatenate(full, dimension)))
    return [Value(out[0], tuple(terms))]


@rule("rev")
def _rev(walk: Walk, out: tuple, x: Value, dimensions: Any, **_: Any) -> list[Value]:
    return [map_terms(x, out[0], lambda t: np.flip(t, tuple(d for d in dimensions if t.shape[d] > 1)))]


@rule("pad")
def _pad(walk: Walk, out: tuple, x: Value, filler: Value, padding_config: Any, **_: Any) -> list[Value]:
    touched = [d for d, c in enumerate(padding_config) if any(c)]
    loose = tuple(t for t in x.terms if varies(t, touched))
    if filler.constant != 0:
        loose = x.terms
    walk.freeze(loose, "pad")
    return [Value(out[0], tuple(t for t in x.terms if not any(t is u for u in loose)))]


@rule("reduce_sum", "reduce_max", "reduce_min")
def _reduce(walk: Walk, out: tuple, x: Value, axes: Any, **p: Any) -> list[Value]:
    terms = walk.freeze_along(axes, x.terms, f"{p['primitive']} over its channels (a norm)")
    return [Value(out[0], tuple(t.squeeze(tuple(axes)) for t in terms))]


@rule(*MATMULS)
def _matmul(walk: Walk, out: tuple, *xs: Value, primitive: str, **p: Any) -> list[Value]:
    with_params = [k for k in (1, 0) if xs[k].param is not None and xs[1 - k].param is None]
    m = matmul(primitive, p, [x.shape for x in xs], with_params[0] if with_params else 1)
    if m is None:
        walk.freeze([t for x in xs for t in x.terms], primitive)
        return [Value(out[0])]
    w, x = xs[m.w], xs[1 - m.w]
    if not with_params or not m.contracted or w.view is None or x.view is None:
        return [Value(out[0], _product(walk, m, x, w, SUMMED))]
    _record(walk, m, w, x)
    terms = _product(walk, m, x, w, "no op before it could take a scale")
    return [Value(out[0], terms, product_of=w.param, origin=w.param)]


def _product(walk: Walk, m: Matmul, x: Value, w: Value, unmatched: str) -> tuple[Ids, ...]:
    """The terms of a matmul's result; those along what it sums must cancel.

    Args:
      unmatched: why they are frozen where one side has none.
    """
    matrices = walk.freeze_along(m.w_batch, w.terms, "experts read sorted rows") if m.grouped else w.terms
    matrices = [m.matrices(t) for t in walk.alive(matrices)]
    summed, rows = _divided(walk, m, [m.rows(t) for t in walk.alive(x.terms)], len(m.tokens))
    summed_too, columns = _divided(walk, m, [t[0] for t in matrices] if m.grouped else matrices, len(m.w_free))
    walk.equal(summed, tuple(-t for t in summed_too), SUMMED if summed and summed_too else unmatched)
    n, n_batch = len(m.order), len(m.batch)
    of_rows = range(n_batch + len(m.tokens))
    of_columns = [*range(n_batch), *range(n - len(m.w_free), n)]
    terms = [spread(t, range(t.ndim), places, n) for ts, places in ((rows, of_rows), (columns, of_columns)) for t in ts]
    return tuple(t.transpose(m.order) for t in terms)


SUMMED = "a matmul sums over its channels"


def _divided(walk: Walk, m: Matmul, terms: list[Ids], n_outer: int) -> tuple[tuple[Ids, ...], list[Ids]]:
    """Of terms (*batch, *outer, *contracted) those along what is summed (*batch, *contracted), and the others."""
    n = len(m.batch)
    outer, inner = range(n, n + n_outer), range(n + n_outer, n + n_outer + len(m.contracted))
    walk.freeze([t for t in terms if varies(t, inner) and varies(t, outer)], SUMMED)
    summed = [t for t in terms if varies(t, inner) and not varies(t, outer)]
    passed = [t.reshape(t.shape[: n + n_outer]) for t in terms if not varies(t, inner)]
    return tuple(t.reshape(*t.shape[:n], *t.shape[n + n_outer :]) for t in summed), passed


def _record(walk: Walk, m: Matmul, w: Value, x: Value) -> None:
    """Note a matmul with a param, and which of the param's axes it reads as one."""
    assert w.view is not None
    assert w.param is not None
    assert x.view is not None
    layout, seen = w.view.layout(m.w_batch, m.w_contracted), x.view.layout(m.batch, m.contracted)
    if w.view.matrix_cuts(layout) is None:
        return walk.use(w, "shard_map")
    layout = w.view.of_param(layout)
    if (joint := _read_as_one(layout, w.view.stack)) is not None:
        walk.found[w.param] = joint
    reads = (x.root, seen.atoms, seen.axes[:-1], walk.scope)
    walk.dots.append(Dot(w.param, layout, w.view.stack, w.view.picks, reads, _input_ids(m, w), x.product_of))


def _read_as_one(layout: Layout, stack: tuple[int, ...]) -> tuple[tuple[int, ...], ...] | None:
    """The axes of a param that make up its inputs, or its outputs; None where one is in both."""
    inputs, outputs = (tuple(sorted({in_param(stack, layout.atoms[a][0]) for a in axis})) for axis in layout.axes[-2:])
    return None if set(inputs) & set(outputs) else tuple(axes for axes in (inputs, outputs) if len(axes) > 1)


def _input_ids(m: Matmul, w: Value) -> Ids:
    """The unknowns of the channels that a matmul sums over, flat; zeros where there is not one for each."""
    others = [k for k in range(len(w.shape)) if k not in m.w_contracted]
    along = [t for t in w.terms if varies(t, m.w_contracted) and not varies(t, others)]
    sizes = [w.shape[k] for k in m.w_contracted]
    if len(along) != 1:
        return np.zeros(math.prod(sizes), np.int32)
    ids = along[0].transpose([*m.w_contracted, *others])
    return np.broadcast_to(ids.reshape(ids.shape[: len(sizes)]), sizes).ravel()

"""What each primitive does to the unknown scales of its operands, control flow apart (see gauge.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from awq_jax.kernels.partitioning import names_of
from awq_jax.tracing.folds.unknowns import Dot, Ids, Value, Walk, collapsed, reshape_ids, varies
from awq_jax.tracing.primitives import is_grouped_by_rows, is_pointwise, pointwise_slices
from awq_jax.tracing.view import STRUCTURAL
from awq_jax.weights.layout import in_param

Rule = Callable[..., list[Value]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(f: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, f))
        return f

    return register


def map_terms(value: Value, shape: tuple[int, ...], f: Callable[[Ids], Ids]) -> Value:
    return Value(shape, tuple(f(t) for t in value.terms))


@rule(*(STRUCTURAL.keys() - {"slice"}), "stop_gradient")
def _structural(walk: Walk, out: tuple, x: Value, *_: Value, primitive: str, **p: Any) -> list[Value]:
    (shape,) = out
    if x.terms and not jnp.issubdtype(p.get("new_dtype", jnp.float32), jnp.inexact):
        walk.freeze(x.terms, f"rounded to {jnp.dtype(p['new_dtype']).name}")
        return [Value(shape)]
    move: dict[str, Callable[[Ids], Ids]] = {
        "transpose": lambda t: t.transpose(p["permutation"]),
        "reshape": lambda t: reshape_ids(t, x.shape, shape),
        "squeeze": lambda t: t.squeeze(tuple(p["dimensions"])),
        "broadcast_in_dim": lambda t: _broadcast_ids(t, shape, p["broadcast_dimensions"]),
    }
    view = STRUCTURAL.get(primitive, lambda v, _: v)(x.view, p) if x.view is not None else None
    terms = tuple(move.get(primitive, lambda t: t)(t) for t in x.terms)
    if view is None:
        walk.use(x, primitive)
        return [Value(shape, terms, constant=x.constant, product_of=x.product_of)]
    return [Value(shape, terms, x.root, view, x.param, x.constant, x.product_of)]


def _broadcast_ids(t: Ids, shape: tuple[int, ...], dimensions: tuple[int, ...]) -> Ids:
    new = [1] * len(shape)
    for k, d in enumerate(dimensions):
        new[d] = t.shape[k]
    return t.reshape(new)


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
def _slice(
    walk: Walk, out: tuple, x: Value, start_indices: Any, limit_indices: Any, strides: Any, **_: Any
) -> list[Value]:
    picked = None if x.view is None else x.view.pick(start_indices, limit_indices, strides)
    if x.param is not None and picked is not None:
        walk.freeze(x.terms, "sliced layer by layer")
        walk.found.setdefault(x.param, ())
        return [Value(out[0], (), x.root, picked, x.param)]
    cut = [slice(a, b, c) for a, b, c in zip(start_indices, limit_indices, strides or [1] * len(x.shape), strict=True)]
    return [
        map_terms(
            x,
            out[0],
            lambda t: t[tuple(c if n > 1 else slice(None) for c, n in zip(cut, t.shape, strict=True))],
        )
    ]


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


@rule("dot_general")
def _dot(walk: Walk, out: tuple, x: Value, y: Value, dimension_numbers: Any, **_: Any) -> list[Value]:
    (cx, cy), (bx, by) = dimension_numbers
    product_of = None
    for w, other, contracted, batch, theirs, their_batch in ((y, x, cy, by, cx, bx), (x, y, cx, bx, cy, by)):
        if w.param is not None and other.param is None and None not in (w.view, other.view) and contracted:
            _record(walk, w, other, contracted, batch, theirs, their_batch)
            product_of = w.param
            break
    frees = [[k for k in range(len(v.shape)) if k not in (*c, *b)] for v, c, b in ((x, cx, bx), (y, cy, by))]
    aligned: list[list[Ids]] = [[], []]
    outgoing: list[Ids] = []
    for side, (v, c, b) in enumerate(((x, cx, bx), (y, cy, by))):
        for t in walk.alive(v.terms):
            order = [*b, *c, *frees[side]]
            moved = t.transpose(order)
            nb, nc = len(b), len(c)
            if varies(t, c) and varies(t, frees[side]):
                walk.freeze([t], "a matmul sums over its channels")
            elif varies(t, c):
                aligned[side].append(moved.reshape(moved.shape[: nb + nc]))
            else:
                head, tail = moved.shape[:nb], moved.shape[nb + nc :]
                before, after = (0, len(frees[1])) if side == 0 else (len(frees[0]), 0)
                outgoing.append(moved.reshape(*head, *[1] * before, *tail, *[1] * after))
    reason = "a matmul sums over its channels"
    if product_of is not None and not (aligned[0] and aligned[1]):
        reason = "no op before it could take a scale"
    walk.equal(tuple(aligned[0]), tuple(-t for t in aligned[1]), reason)
    return [Value(out[0], tuple(outgoing), product_of=product_of, origin=product_of)]


def _record(walk: Walk, w: Value, x: Value, contracted: Any, batch: Any, theirs: Any, their_batch: Any) -> None:
    assert w.view is not None
    assert w.param is not None
    assert x.view is not None
    layout, seen = w.view.layout(batch, contracted), x.view.layout(their_batch, theirs)
    if w.view.matrix_cuts(layout) is None:
        return walk.use(w, "shard_map")
    free = [k for k in range(len(w.shape)) if k not in (*contracted, *batch)]
    layout = w.view.of_param(layout)
    inputs, outputs = (
        tuple(sorted({in_param(w.view.stack, layout.atoms[a][0]) for a in axis})) for axis in layout.axes[-2:]
    )
    if not set(inputs) & set(outputs):
        walk.found[w.param] = tuple(axes for axes in (inputs, outputs) if len(axes) > 1)
    along = [t for t in w.terms if varies(t, contracted) and not varies(t, (*free, *batch))]
    sizes = [w.shape[k] for k in contracted]
    in_ids = np.zeros(sizes, np.int32)
    if len(along) == 1:
        moved = along[0].transpose([*contracted, *batch, *free]).reshape([along[0].shape[k] for k in contracted])
        in_ids = np.broadcast_to(moved, sizes)
    reads = (x.root, seen.atoms, seen.axes[:-1], walk.scope)
    walk.dots.append(Dot(w.param, layout, w.view.stack, w.view.picks, reads, in_ids.ravel(), x.product_of))


@rule("ragged_dot_general")
def _ragged_dot(walk: Walk, out: tuple, x: Value, w: Value, sizes: Value, **p: Any) -> list[Value]:
    numbers = p["ragged_dot_dimension_numbers"]
    if w.param is None or w.view is None or x.param is not None or not is_grouped_by_rows(numbers):
        walk.freeze((*x.terms, *w.terms), "ragged_dot_general")
        return [Value(out[0])]
    (cx, cw), _ = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    _record(walk, w, x, cw, groups, cx, ())
    (free,) = (k for k in range(3) if k not in (*cw, *groups))
    alike = Value(w.shape, walk.freeze_along(groups, w.terms, "experts read sorted rows"))
    matrix = map_terms(alike, (w.shape[cw[0]], w.shape[free]), lambda t: t.transpose(*cw, free, *groups)[..., 0])
    return _dot(walk, out, x, matrix, dimension_numbers=((cx, (0,)), ((), ())))


@rule("conv_general_dilated")
def _convolution(walk: Walk, out: tuple, x: Value, w: Value, **p: Any) -> list[Value]:
    of_x, of_w, of_out = p["dimension_numbers"]
    if w.param is None or w.view is None or x.param is not None or not is_pointwise(p, w.shape):
        walk.freeze((*x.terms, *w.terms), "conv_general_dilated")
        return [Value(out[0])]
    _record(walk, w, x, (of_w[1],), (), (of_x[1],), ())
    cut, order, n = pointwise_slices(p), [of_x[0], *of_x[2:], of_x[1]], len(of_x)

    def rows(t: Ids) -> Ids:
        return t[tuple(c if n > 1 else slice(None) for c, n in zip(cut, t.shape, strict=True))].transpose(order)

    places = [out[0][of_out[0]], *(out[0][k] for k in of_out[2:])]
    flat = lambda t: t.transpose(of_w[1], of_w[0], *of_w[2:]).squeeze(tuple(range(2, n)))
    x = map_terms(x, (*places, x.shape[of_x[1]]), rows)
    w = map_terms(w, (w.shape[of_w[1]], w.shape[of_w[0]]), flat)
    (y,) = _dot(walk, ((*places, w.shape[1]),), x, w, dimension_numbers=(((n - 1,), (0,)), ((), ())))
    back = [(0, n - 1, *range(1, n - 1))[of_out.index(k)] for k in range(n)]
    return [map_terms(y, out[0], lambda t: t.transpose(back))]

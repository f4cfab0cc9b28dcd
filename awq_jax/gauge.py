"""The gauge freedoms of a function: which channels of which params can be rescaled without changing it.

Every param axis gets one unknown log-scale per position. Walking the jaxpr, each value carries the sum of the
unknowns by which its elements would be scaled (`terms`), and each equation adds what it needs to stay exact:

  x * w               the scales add                       x + y         they must be equal
  dot over an axis    those along it must cancel           exp(x), ...   there must be none: frozen

All constraints have the form a = b, a = -b or a = 0, so the solutions are the connected components of a graph over
(unknown, sign). A component with a norm's weight and the inputs of q, k and v is what AWQ calls a fold. No
architecture is known here; shared-expert gates, routers and tied weights are simply further equations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jax.extend import core
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from awq_jax.compat import scan_split
from awq_jax.tensor import Layout
from awq_jax.views import STRUCTURAL, View

Ids = np.ndarray
"""int32, one signed unknown per element (0: none), with size 1 along axes on which it is constant."""


@dataclass(frozen=True)
class Value:
    """What is known of one array: its unknown scales, where it came from, and its value if it is one number."""

    shape: tuple[int, ...]
    terms: tuple[Ids, ...] = ()
    root: Any = None
    view: View | None = None
    param: str | None = None
    constant: float | None = None


@dataclass(frozen=True)
class Dot:
    """One matmul of an activation with a param: `reads` tells which inputs are the same tensor and channels."""

    param: str
    layout: Layout
    stacked: int
    reads: Any
    input_shape: tuple[int, ...]
    n_batch: int
    in_ids: Ids


@dataclass
class Walk:
    """State of one pass over a jaxpr."""

    dead: np.ndarray
    offsets: dict[str, float]
    joint: dict[str, tuple[tuple[int, ...], ...]]
    ids: dict[tuple[str, tuple[int, ...]], Ids] = field(default_factory=dict)
    stacked: dict[str, int] = field(default_factory=dict)
    scans: dict[str, int] = field(default_factory=dict)
    dots: list[Dot] = field(default_factory=list)
    found: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    edges: list[tuple[Ids, Ids]] = field(default_factory=list)
    frozen: list[tuple[Ids, str]] = field(default_factory=list)
    unclear: list[tuple[Ids, str]] = field(default_factory=list)
    count: int = 0
    n_scans: int = 0

    def axes_ids(self, param: str, axes: tuple[int, ...], size: int) -> Ids:
        if (param, axes) not in self.ids:
            self.ids[param, axes] = np.arange(self.count + 1, self.count + 1 + size, dtype=np.int32)
            self.count += size
        return self.ids[param, axes]

    def freeze(self, terms: Iterable[Ids], reason: str) -> None:
        self.frozen += [(t.ravel(), reason) for t in terms]

    def alive(self, terms: Iterable[Ids]) -> tuple[Ids, ...]:
        """`terms` without the unknowns that an earlier pass proved to be zero."""
        kept = []
        for t in terms:
            known = np.abs(t) < len(self.dead)
            t = np.where(known & self.dead[np.where(known, np.abs(t), 0)], 0, t)
            if t.any():
                kept.append(t)
        return tuple(kept)

    def equal(self, a: tuple[Ids, ...], b: tuple[Ids, ...], reason: str) -> tuple[Ids, ...]:
        """Demand that two values scale alike; the terms of both."""
        a, b = self.alive(a), self.alive(b)
        same = [t for t in a if any(t.shape == u.shape and np.array_equal(t, u) for u in b)]
        a_rest = [t for t in a if not any(t is s for s in same)]
        b_rest = [u for u in b if not any(t.shape == u.shape and np.array_equal(t, u) for t in same)]
        if len(a_rest) <= 1 and len(b_rest) <= 1:
            left = a_rest[0] if a_rest else np.zeros((1,) * (b_rest[0].ndim if b_rest else 0), np.int32)
            right = b_rest[0] if b_rest else np.zeros((1,) * left.ndim, np.int32)
            self.link(left, right, reason)
        else:
            self.unclear += [(t.ravel(), reason) for t in (*a_rest, *b_rest)]
        return a if len(a) >= len(b) else b

    def link(self, a: Ids, b: Ids, reason: str) -> None:
        a, b = (t.ravel() for t in np.broadcast_arrays(a, b))
        self.edges.append((a[(a != 0) & (b != 0)], b[(a != 0) & (b != 0)]))
        self.frozen += [(a[b == 0], reason), (b[a == 0], reason)]


def param_value(walk: Walk, name: str, shape: tuple[int, ...], stacked: int = 0) -> Value:
    """A param as it enters: one unknown for each position of each axis, or of each set of joint axes."""
    walk.stacked[name] = max(stacked, walk.stacked.get(name, 0))
    together = [tuple(a - stacked for a in axes) for axes in walk.joint.get(name, ()) if min(axes) >= stacked]
    alone = [(k,) for k in range(len(shape)) if not any(k in axes for axes in together)]
    terms = []
    for axes in (*together, *alone):
        sizes = [n if k in axes else 1 for k, n in enumerate(shape)]
        if math.prod(sizes) > 1:
            terms.append(walk.axes_ids(name, tuple(a + stacked for a in axes), math.prod(sizes)).reshape(sizes))
    return Value(shape, tuple(terms), name, View.of(shape), name)


def reshape_ids(ids: Ids, old: tuple[int, ...], new: tuple[int, ...]) -> Ids:
    """`ids` of a value of shape `old` after its reshape to `new`; expands only where axes really mix."""
    pieces: list[int] = []
    full: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b, p, q = i, j, 1, 1
        while True:
            if p == q and (i > a or j > b):
                break
            if p <= q and i < len(old):
                p, i = p * old[i], i + 1
            elif j < len(new):
                q, j = q * new[j], j + 1
            else:
                p, i = p * old[i], i + 1
        constant = all(n == 1 for n in ids.shape[a:i])
        pieces += [1] * (j - b) if constant else list(new[b:j])
        full += [1] * (i - a) if constant else list(old[a:i])
    return np.broadcast_to(ids, full).reshape(pieces)


def varies(ids: Ids, axes: Iterable[int]) -> bool:
    return any(ids.shape[k] > 1 for k in axes)


Rule = Callable[..., list[Value]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(f: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, f))
        return f

    return register


def map_terms(value: Value, shape: tuple[int, ...], f: Callable[[Ids], Ids]) -> Value:
    return Value(shape, tuple(f(t) for t in value.terms))


@rule(
    "transpose",
    "reshape",
    "squeeze",
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "copy_p",
    "stop_gradient",
)
def _structural(walk: Walk, out: tuple, x: Value, *_: Value, primitive: str, **p: Any) -> list[Value]:
    (shape,) = out
    move: dict[str, Callable[[Ids], Ids]] = {
        "transpose": lambda t: t.transpose(p["permutation"]),
        "reshape": lambda t: reshape_ids(t, x.shape, shape),
        "squeeze": lambda t: t.squeeze(tuple(p["dimensions"])),
        "broadcast_in_dim": lambda t: _broadcast_ids(t, shape, p["broadcast_dimensions"]),
    }
    view = STRUCTURAL.get(primitive, lambda v, _: v)(x.view, p) if x.view is not None else None
    terms = tuple(move.get(primitive, lambda t: t)(t) for t in x.terms)
    if view is None:
        return [Value(shape, terms, constant=x.constant)]
    return [Value(shape, terms, x.root, view, x.param, x.constant)]


def _broadcast_ids(t: Ids, shape: tuple[int, ...], dimensions: tuple[int, ...]) -> Ids:
    new = [1] * len(shape)
    for k, d in enumerate(dimensions):
        new[d] = t.shape[k]
    return t.reshape(new)


@rule("mul")
def _mul(walk: Walk, out: tuple, x: Value, y: Value, **_: Any) -> list[Value]:
    return [Value(out[0], walk.alive(x.terms + y.terms))]


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
            return [Value(out[0], a.terms, a.root, a.view, a.param) if a.shape == out[0] else Value(out[0], a.terms)]
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


@rule("slice")
def _slice(
    walk: Walk, out: tuple, x: Value, start_indices: Any, limit_indices: Any, strides: Any, **_: Any
) -> list[Value]:
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
        joined = np.concatenate(full, dimension)
        first = joined.take([0], dimension)
        terms.append(first if (joined == first).all() else joined)
    return [Value(out[0], tuple(terms))]


@rule("rev")
def _rev(walk: Walk, out: tuple, x: Value, dimensions: Any, **_: Any) -> list[Value]:
    return [map_terms(x, out[0], lambda t: np.flip(t, [d for d in dimensions if t.shape[d] > 1]))]


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
    walk.freeze([t for t in x.terms if varies(t, axes)], f"{p['primitive']} over its channels (a norm)")
    return [Value(out[0], tuple(t.squeeze(tuple(axes)) for t in x.terms if not varies(t, axes)))]


@rule("dot_general")
def _dot(walk: Walk, out: tuple, x: Value, y: Value, dimension_numbers: Any, **_: Any) -> list[Value]:
    (cx, cy), (bx, by) = dimension_numbers
    for w, other, contracted, batch, theirs, their_batch in ((y, x, cy, by, cx, bx), (x, y, cx, bx, cy, by)):
        if w.param is not None and other.param is None and w.view is not None:
            _record(walk, w, other, contracted, batch, theirs, their_batch)
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
    walk.equal(tuple(aligned[0]), tuple(-t for t in aligned[1]), "a matmul sums over its channels")
    return [Value(out[0], tuple(outgoing))]


def _record(walk: Walk, w: Value, x: Value, contracted: Any, batch: Any, theirs: Any, their_batch: Any) -> None:
    assert w.view is not None
    assert w.param is not None
    assert x.view is not None
    stacked = walk.stacked[w.param]
    layout, seen = w.view.layout(batch, contracted), x.view.layout(their_batch, theirs)
    tokens = [k for k in range(len(x.shape)) if k not in (*theirs, *their_batch)]
    free = [k for k in range(len(w.shape)) if k not in (*contracted, *batch)]
    origin = np.repeat(np.arange(len(w.view.base)), [_atoms(w.view, k) for k in range(len(w.view.base))])
    inputs, outputs = (
        tuple(sorted({int(origin[a]) + stacked for k in axes for a in w.view.axes[k]})) for axes in (contracted, free)
    )
    if not set(inputs) & set(outputs):
        walk.found[w.param] = tuple(axes for axes in (inputs, outputs) if len(axes) > 1)
    along = [t for t in w.terms if varies(t, contracted) and not varies(t, (*free, *batch))]
    sizes = [w.shape[k] for k in contracted]
    in_ids = np.zeros(sizes, np.int32)
    if len(along) == 1:
        moved = along[0].transpose([*contracted, *batch, *free]).reshape([along[0].shape[k] for k in contracted])
        in_ids = np.broadcast_to(moved, sizes)
    shape = tuple(x.shape[k] for k in (*their_batch, *tokens, *theirs))
    reads = (x.root, seen.sizes, seen.order[: seen.n_lead + seen.n_in])
    walk.dots.append(Dot(w.param, layout, stacked, reads, shape, len(their_batch), in_ids.ravel()))


def _atoms(view: View, axis: int) -> int:
    """Into how many atoms the view cuts an axis of its base."""
    before = math.prod(view.base[:axis])
    ends = np.cumprod([1, *view.sizes])
    return int(((ends > before) & (ends <= before * view.base[axis])).sum()) if view.base[axis] > 1 else 0


@rule(
    "pjit",
    "jit",
    "closed_call",
    "core_call",
    "remat2",
    "remat",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
)
def _call(walk: Walk, out: tuple, *xs: Value, primitive: str, **p: Any) -> list[Value]:
    body = p.get("jaxpr") or p.get("call_jaxpr")
    return evaluate(walk, body, xs)


@rule("scan")
def _scan(walk: Walk, out: tuple, *xs: Value, jaxpr: Any, **p: Any) -> list[Value]:
    n, k = scan_split(p)
    walk.n_scans += 1
    inside = list(xs[:n])
    for carried in xs[n : n + k]:
        walk.freeze(carried.terms, "carried through a scan")
        inside.append(Value(carried.shape))
    for x in xs[n + k :]:
        if x.param is not None and x.view == View.of(x.shape):
            first = walk.scans.setdefault(x.param, walk.n_scans)
            walk.found.setdefault(x.param, ())
            inside.append(param_value(walk, x.param, x.shape[1:], walk.stacked[x.param] + 1))
            if first != walk.n_scans:
                walk.freeze(inside[-1].terms, "sliced by two scans")
        else:
            walk.freeze(x.terms, "sliced by a scan")
            inside.append(Value(x.shape[1:]))
    for y in evaluate(walk, jaxpr, inside):
        walk.freeze(y.terms, "carried through a scan")
    return [Value(shape) for shape in out]


def evaluate(walk: Walk, jaxpr: Any, args: Iterable[Value]) -> list[Value]:
    """Walk the equations of a (closed) jaxpr."""
    consts = getattr(jaxpr, "consts", ())
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    env: dict[Any, Value] = {}

    def write(var: Any, value: Value) -> None:
        if value.root is None:
            value = replace(value, root=object(), view=View.of(value.shape))
        env[var] = value

    for var, const in zip(jaxpr.constvars, consts, strict=True):
        write(var, known(const))
    for var, arg in zip(jaxpr.invars, args, strict=True):
        write(var, arg)
    for eqn in jaxpr.eqns:
        ins = [known(v.val) if isinstance(v, core.Literal) else env[v] for v in eqn.invars]
        name = eqn.primitive.name
        shapes = tuple(v.aval.shape for v in eqn.outvars)
        if name not in CARRIES_PARAMS and not (name in ("add", "sub") and any(v.constant is not None for v in ins)):
            for v in ins:
                if v.param in walk.offsets:
                    walk.freeze(v.terms, f"used both as w and as {walk.offsets[v.param]:g} + w")
        if name in RULES:
            outs = RULES[name](walk, shapes, *ins, primitive=name, **eqn.params)
        else:
            for v in ins:
                walk.freeze(v.terms, name)
            outs = [Value(shape) for shape in shapes]
        for var, value in zip(eqn.outvars, outs, strict=True):
            write(var, value)
    return [known(v.val) if isinstance(v, core.Literal) else env[v] for v in jaxpr.outvars]


CALLS = (
    "pjit",
    "jit",
    "closed_call",
    "core_call",
    "remat2",
    "remat",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
)
CARRIES_PARAMS = {*STRUCTURAL, *CALLS, "scan"}


def known(x: Any) -> Value:
    shape = np.shape(x)
    return Value(shape, constant=float(x) if shape == () and np.issubdtype(np.asarray(x).dtype, np.number) else None)


@dataclass(frozen=True)
class Components:
    """`component[k]` of unknown k (0: must stay as it is), its `sign` in it, and why the others are frozen."""

    walk: Walk
    component: np.ndarray
    sign: np.ndarray
    reasons: dict[int, str]


def solve(walk: Walk, frozen: list[tuple[Ids, str]]) -> Components:
    n = walk.count + 1
    a, b = (np.concatenate([np.zeros(0, np.int64), *(e[k] for e in walk.edges)]).astype(np.int64) for k in (0, 1))
    node = lambda k, flip=False: 2 * np.abs(k) + ((k < 0) ^ flip)
    rows = np.concatenate([node(a), node(a, True)])
    cols = np.concatenate([node(b), node(b, True)])
    graph = coo_array((np.ones(len(rows), np.int8), (rows, cols)), shape=(2 * n, 2 * n))
    _, label = connected_components(graph, directed=False)
    plus, minus = label[0::2], label[1::2]
    scan_of = np.zeros(n, np.int64)
    for (param, _), ids in walk.ids.items():
        scan_of[ids] = walk.scans.get(param, 0)
    low = np.full(label.max() + 1, np.iinfo(np.int64).max)
    high = np.full(label.max() + 1, -1)
    for side in (plus, minus):
        np.minimum.at(low, side[1:], scan_of[1:])
        np.maximum.at(high, side[1:], scan_of[1:])
    why: dict[int, str] = dict.fromkeys(
        np.flatnonzero(low < high), "shared by the layers of a scan and by what is outside"
    )
    why |= dict.fromkeys(plus[plus == minus].tolist(), "scaled by itself and by its inverse")
    for ids, reason in frozen:
        for k in np.unique(np.abs(ids[ids != 0])):
            why.setdefault(int(plus[k]), reason)
            why.setdefault(int(minus[k]), reason)
    dead = np.zeros(label.max() + 1, bool)
    dead[list(why)] = True
    is_dead = dead[plus] | dead[minus]
    is_dead[0] = True
    component = np.where(is_dead, 0, np.minimum(plus, minus) + 1)
    sign = np.where(plus <= minus, 1, -1)
    reasons = {k: why.get(int(plus[k])) or why[int(minus[k])] for k in np.flatnonzero(is_dead)[1:].tolist()}
    return Components(walk, component, sign, reasons)


def components(jaxpr: Any, params: dict[int, tuple[str, tuple[int, ...]]]) -> Components:
    """Every gauge freedom of a closed jaxpr; `params` names the arguments that are params (position -> name, shape)."""
    dead, offsets, joint = np.ones(1, bool), {}, {}
    known_frozen: list[tuple[Ids, str]] = []
    while True:
        walk = Walk(dead, dict(offsets), joint)
        shapes = [v.aval.shape for v in jaxpr.jaxpr.invars]
        args = [param_value(walk, *params[k]) if k in params else Value(s) for k, s in enumerate(shapes)]
        for out in evaluate(walk, jaxpr, args):
            walk.freeze(out.terms, "an output of the function")
        loose = {n: (tuple(range(len(s))),) for n, s in params.values() if n not in walk.found and 1 < len(s) < 4}
        wanted = {n: axes for n, axes in (loose | walk.found).items() if axes}
        if (walk.offsets, wanted) != (offsets, joint):
            dead, offsets, joint, known_frozen = np.ones(1, bool), walk.offsets, wanted, []
            continue
        # What an earlier pass froze has dropped out of this pass's constraints.
        solved = solve(walk, known_frozen + walk.frozen)
        if not walk.unclear:
            return solved
        now = solved.component == 0
        if len(now) == len(dead) and (now == dead).all():
            return solve(walk, known_frozen + walk.frozen + walk.unclear)
        dead = now
        known_frozen = [(np.array([k], np.int32), reason) for k, reason in solved.reasons.items()]

"""The channel freedoms of a function: which channels of which params can be rescaled without changing it.

Every param axis gets one unknown log-scale per position. Walking the jaxpr, each value carries the sum of the
unknowns by which its elements would be scaled (`terms`), and each equation adds what it needs to stay exact:

  x * w               the scales add                       x + y         they must be equal
  dot over an axis    those along it must cancel           exp(x), ...   there must be none: frozen

All constraints have the form a = b, a = -b or a = 0, so the solutions are the connected components of a graph over
(unknown, sign). A component with a norm's weight and the inputs of q, k and v is what AWQ calls a fold. No
architecture is known here; shared-expert gates, routers and tied weights are simply further equations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jax.extend import core
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

import awq_jax.tracing.folds.rows  # noqa: F401 (its rules)
from awq_jax.compat import CALLS, scan_split
from awq_jax.tracing.folds.rules import RULES, rule
from awq_jax.tracing.folds.unknowns import Ids, Value, Walk, known, param_value
from awq_jax.tracing.primitives import MATMULS, STRUCTURAL, body_of_call
from awq_jax.tracing.view import View
from awq_jax.weights.layout import Cuts, in_param, pieces
from awq_jax.weights.sharding import cuts_of

RANKS = {"top_k", "sort", "argmax", "approx_top_k"}
"""What decides by an order: among a router's outputs, or among a vocabulary's."""
CARRIES_PARAMS = {*STRUCTURAL, *CALLS, "scan", "while", "cond", "shard_map", "all_gather"} - {"slice"}


@rule(*CALLS)
def _call(walk: Walk, out: tuple, *xs: Value, primitive: str, **p: Any) -> list[Value]:
    return evaluate(walk, body_of_call(p), xs)


@rule("scan")
def _scan(walk: Walk, out: tuple, *xs: Value, jaxpr: Any, **p: Any) -> list[Value]:
    n, k = scan_split(p)
    walk.n_scans += 1
    inside = list(xs[:n])
    for carried in xs[n : n + k]:
        walk.freeze(carried.terms, "carried through a scan")
        walk.use(carried, "scan")
        inside.append(Value(carried.shape))
    for x in xs[n + k :]:
        if x.param is not None and x.view is not None and x.view.layers is not None:
            first = walk.scans.setdefault(x.param, walk.n_scans)
            inside.append(_layer(walk, x))
            if first != walk.n_scans:
                walk.freeze(inside[-1].terms, "sliced by two scans")
        else:
            walk.freeze(x.terms, "sliced by a scan")
            walk.use(x, "scan")
            inside.append(Value(x.shape[1:]))
    for y in evaluate(walk, jaxpr, inside):
        walk.freeze(y.terms, "carried through a scan")
    return [Value(shape) for shape in out]


def _layer(walk: Walk, x: Value) -> Value:
    """What a scan sees of a stacked param."""
    assert x.param is not None
    assert x.view is not None
    view = x.view.slice
    if not view.cuts:
        return param_value(walk, x.param, view.shape, view.stack)
    walk.stacks[x.param] = view.stack
    return Value(view.shape, tuple(t[0] for t in x.terms if len(t) == 1), x.param, view, x.param)


@rule("shard_map")
def _shard_map(
    walk: Walk, out: tuple, *xs: Value, jaxpr: Any, in_specs: Any, out_specs: Any, mesh: Any, **p: Any
) -> list[Value]:
    inside: list[Value] = []
    seen: dict[str | None, View] = {}
    for x, spec in zip(xs, in_specs, strict=True):
        cuts = cuts_of(spec, len(x.shape), mesh)
        shape = tuple(n // k for n, k in zip(x.shape, pieces(cuts), strict=True))
        uncut = walk.freeze_along(_cut_axes(cuts), x.terms, "cut into shards")
        view = x.view.shard(cuts) if x.param is not None and x.view is not None else None
        if view is None or seen.get(x.param, view) != view:
            walk.use(x, "shard_map")
            inside.append(Value(shape, uncut, constant=x.constant, product_of=x.product_of, origin=x.origin))
        else:
            seen[x.param] = view
            terms = tuple(t[tuple(slice(n) for n in shape)] for t in x.terms)
            inside.append(Value(shape, terms, x.root, view, x.param))
    outs = []
    for shape, spec, y in zip(out, out_specs, evaluate(walk, jaxpr, inside), strict=True):
        cuts = cuts_of(spec, len(shape), mesh)
        terms = walk.freeze_along(_cut_axes(cuts), y.terms, "cut into shards")
        walk.use(y, "shard_map")
        outs.append(Value(shape, terms, product_of=y.product_of, origin=y.origin))
    return outs


def _cut_axes(cuts: Cuts) -> list[int]:
    return [k for k, cut in enumerate(cuts) if cut]


@rule("while")
def _while(walk: Walk, out: tuple, *xs: Value, **p: Any) -> list[Value]:
    n, m = p["cond_nconsts"], p["body_nconsts"]
    for carried in xs[n + m :]:
        walk.freeze(carried.terms, "carried through a loop")
        walk.use(carried, "while")
    carry = [Value(x.shape) for x in xs[n + m :]]
    for x in xs[:n]:
        walk.use(x, "while")
    # Nothing can be recorded in a condition: its matmuls are no sites.
    outside = [Value(x.shape, x.terms, constant=x.constant) for x in xs[:n]]
    with walk.inside("while"):
        results = evaluate(walk, p["cond_jaxpr"], [*outside, *carry])
        results += evaluate(walk, p["body_jaxpr"], [*xs[n : n + m], *carry])
    for y in results:
        walk.freeze(y.terms, "carried through a loop")
    return [Value(shape) for shape in out]


@rule("cond")
def _cond(walk: Walk, out: tuple, which: Value, *xs: Value, branches: Any, **p: Any) -> list[Value]:
    walk.freeze(which.terms, "cond")
    results = []
    for branch in branches:
        with walk.inside("cond"):
            results.append(evaluate(walk, branch, xs))
    for y in (y for ys in results for y in ys):
        walk.freeze(y.terms, "comes from a branch of a cond")
        walk.use(y, "cond")
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
    read = lambda v: known(v.val) if isinstance(v, core.Literal) else env[v]
    for eqn in jaxpr.eqns:
        for var, value in zip(eqn.outvars, _equation(walk, eqn, [read(v) for v in eqn.invars]), strict=True):
            write(var, value)
    return [read(v) for v in jaxpr.outvars]


def _equation(walk: Walk, eqn: Any, ins: list[Value]) -> list[Value]:
    name, before = eqn.primitive.name, len(walk.dots)
    if name not in CARRIES_PARAMS:
        _note_readings(walk, name, ins)
    outs = RULES.get(name, _unknown)(walk, tuple(v.aval.shape for v in eqn.outvars), *ins, primitive=name, **eqn.params)
    if name not in CARRIES_PARAMS and len(walk.dots) == before and all(out.param is None for out in outs):
        for v in ins:
            walk.use(v, name)
    if name in RANKS:
        walk.ranked |= {v.origin for v in ins if v.origin is not None}
    return [replace(out, origin=_origin(name, ins)) if out.origin is None else out for out in outs]


def _unknown(walk: Walk, out: tuple, *xs: Value, primitive: str, **_: Any) -> list[Value]:
    """What a primitive without a rule gives: nothing that reaches it may be scaled."""
    walk.freeze([t for x in xs for t in x.terms], primitive)
    return [Value(shape) for shape in out]


def _note_readings(walk: Walk, name: str, ins: list[Value]) -> None:
    """Of params that an equation reads: with how many axes, and that those used as 1 + w are not used as w too."""
    is_shift = name in ("add", "sub") and any(v.constant is not None for v in ins)
    for v in ins:
        if v.param is not None and v.view is not None:
            walk.ndims.setdefault(v.param, set()).add(len(v.view.shape))
        if v.param in walk.offsets and not is_shift:
            walk.freeze(v.terms, f"used both as w and as {walk.offsets[v.param]:g} + w")


def _origin(name: str, ins: list[Value]) -> str | None:
    """The one param whose matmul all of an elementwise result or of a sum comes from."""
    origins = {v.origin for v in ins} - {None}
    return origins.pop() if len(origins) == 1 and name not in MATMULS else None


@dataclass(frozen=True)
class Components:
    """`component[k]` of unknown k (0: must stay as it is), its `sign` in it, and why the others are frozen.

    `why[k]` is the number of a reason; it means something where `component[k]` is 0.
    """

    walk: Walk
    component: np.ndarray
    sign: np.ndarray
    why: np.ndarray
    reasons: list[str]


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
    why, reasons = np.full(label.max() + 1, -1), dict[str, int]()

    def blame(labels: np.ndarray, reason: str) -> None:
        why[labels[why[labels] < 0]] = reasons.setdefault(reason, len(reasons))

    blame(np.flatnonzero(low < high), "shared by the layers of a scan and by what is outside")
    blame(plus[plus == minus], "scaled by itself and by its inverse")
    for ids, reason in frozen:
        ids = np.abs(ids[ids != 0])
        blame(np.concatenate([plus[ids], minus[ids]]), reason)
    is_dead = (why[plus] >= 0) | (why[minus] >= 0)
    is_dead[0] = True
    component = np.where(is_dead, 0, np.minimum(plus, minus) + 1)
    sign = np.where(plus <= minus, 1, -1)
    return Components(walk, component, sign, np.where(why[plus] >= 0, why[plus], why[minus]), [*reasons])


@dataclass(frozen=True)
class Assumed:
    """What a walk takes for granted; where it finds otherwise another walk assumes that.

    Args:
      offsets: c of the params that are used as c + w.
      joint: by param the sets of its axes that are read as one.
      dead: of the unknowns, those that were proved to be zero.
    """

    offsets: dict[str, float] = field(default_factory=dict)
    joint: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    dead: np.ndarray = field(default_factory=lambda: np.ones(1, bool))


def components(jaxpr: Any, params: dict[int, tuple[str, tuple[int, ...]]]) -> Components:
    """Every channel freedom of a closed jaxpr; `params`: the arguments that are params, position to (name, shape)."""
    assumed, known_frozen = Assumed(), list[tuple[Ids, str]]()
    while True:
        walk = _walked(jaxpr, params, assumed)
        found = Assumed(walk.offsets, _joint(walk, params))
        if (found.offsets, found.joint) != (assumed.offsets, assumed.joint):
            assumed, known_frozen = found, []
            continue
        # What an earlier pass froze has dropped out of this pass's constraints.
        solved = solve(walk, known_frozen + walk.frozen)
        if not walk.unclear:
            return solved
        dead = solved.component == 0
        if np.array_equal(dead, assumed.dead):
            return solve(walk, known_frozen + walk.frozen + walk.unclear)
        assumed = replace(assumed, dead=dead)
        known_frozen = [(np.flatnonzero(dead & (solved.why == k)), reason) for k, reason in enumerate(solved.reasons)]


def _walked(jaxpr: Any, params: dict[int, tuple[str, tuple[int, ...]]], assumed: Assumed) -> Walk:
    walk = Walk(assumed.dead, dict(assumed.offsets), assumed.joint)
    shapes = [v.aval.shape for v in jaxpr.jaxpr.invars]
    args = [param_value(walk, *params[k]) if k in params else Value(s) for k, s in enumerate(shapes)]
    for out in evaluate(walk, jaxpr, args):
        walk.freeze(out.terms, "an output of the function")
        walk.use(out, "return")
    for (name, _), ids in walk.ids.items():
        if len(walk.ndims.get(name, ())) > 1:
            walk.freeze([ids], "used both inside a scan over its layers and outside")
    return walk


def _joint(walk: Walk, params: dict[int, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Axes of params that are one: those that a matmul reads as one, and all of a bias of several heads."""
    widest, loose = walk.widest, {}
    for name, shape in params.values():
        stack = walk.stacks[name]
        free = tuple(in_param(stack, k) for k in range(len(shape) - len(stack)))
        if name not in walk.found and 1 < len(free) < 4 and walk.is_vector(name, shape, widest):
            loose[name] = (free,)
    return {n: axes for n, axes in (loose | walk.found).items() if axes}

"""Runs a jaxpr with some of its arguments held as `Weight`s: rearranged only on paper, multiplied only by a hook.

Equations without a Weight are bound as they are. Control flow that a Weight enters is emitted again through the
public functions (`lax.scan`, `jax.checkpoint`), so any pytree may stand where the weight stood. Matmuls that read one
input are one call of the hook, at the first of them.
"""

from __future__ import annotations

import functools as ft
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jaxtyping import Array

from awq_jax.compat import CALLS, REMAT, scan_split, vary, varying
from awq_jax.tracing.primitives import MATMULS, STRUCTURAL, Matmul, body_of_call, matmul
from awq_jax.tracing.view import View
from awq_jax.weights.layout import Layout, names_in
from awq_jax.weights.tensor import QuantizedTensor, is_quantized

Records = dict[Any, Any]
"""Pytrees by a param's name and its view's picks; where a scan slices the param, with an axis of layers in front."""


@dataclass(frozen=True)
class Weight:
    """The param `name` (dense or quantized) as the traced function sees it, through `view`.

    `varying` are the mesh axes along which it is said to differ, inside a shard_map. `layout` is how a matmul reads it,
    when one does.
    """

    name: str
    base: Any
    view: View
    dtype: Any
    varying: tuple[str, ...] = ()
    layout: Layout | None = None

    @property
    def read(self) -> Layout:
        """How the matmul that reads it does."""
        assert self.layout is not None
        return self.layout

    @property
    def matrix(self) -> QuantizedTensor | Array:
        """What the matmul reads (*lead, i, o); a QuantizedTensor where the param is stored so."""
        if is_quantized(self.base) and self.base.layout == (None if self.read.is_matrix else self.read):
            return self.base
        return self.read.apply(self.base.dequantize() if is_quantized(self.base) else self.base)

    @property
    def cuts(self) -> tuple[str, ...]:
        """The mesh axes that cut the param, inside a shard_map."""
        return names_in(self.view.cuts)

    def whole_input(self, x: Array) -> Array:
        """All channels of the input x (*tokens, i) of a matmul with a shard of the param."""
        names = names_in((self.view.matrix_cuts(self.read) or ((), ()))[-2:-1])
        return lax.all_gather(x, names, axis=x.ndim - 1, tiled=True) if names else x

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """By which records are kept: the name, and the layer of each stack that gave it, -1 where a scan takes all."""
        return self.name, tuple(-1 if pick is None else pick for pick in self.view.picks)

    def dense(self) -> Array:
        base = self.base.dequantize() if is_quantized(self.base) else self.base
        out = self.view.apply(base).astype(self.dtype)
        return vary(out, self.varying) if self.varying else out


Products = tuple[Sequence[Array], Records]
OnDots = Callable[[Sequence[Weight], Array, Array | None, Any], Products]
"""`(weights, x, None, dtype) -> ([y, ...], records)`: x (*lead, *tokens, i), y (*lead, *tokens, o); records add up.

`([weight], x, sizes, dtype)` multiplies sorted rows: of x (rows, i), the first sizes[0] belong to the first expert.
Each y has the dtype, or x's where that is None.
"""


def wider(x: Array, eqn: Any) -> Any:
    """float32 where the equation's result is wider than x (preferred_element_type): its sums are not rounded to x's."""
    return jnp.float32 if eqn.outvars[0].aval.dtype.itemsize > x.dtype.itemsize else None


def dense(x: Any) -> Any:
    return x.dense() if isinstance(x, Weight) else x


def merge(a: Records, b: Records) -> Records:
    """Records of the same name add up."""
    both = {k: jax.tree.map(jnp.add, a[k], b[k]) for k in a.keys() & b.keys()}
    return a | b | both


def evaluate(jaxpr: Any, args: list[Any], on_dots: OnDots) -> tuple[list[Any], Records]:
    """The outputs of a (closed) jaxpr, and what `on_dots` recorded on the way."""
    consts = getattr(jaxpr, "consts", ())
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))
    rearranged, groups = in_groups(jaxpr, {v for v, x in env.items() if isinstance(x, Weight)})
    records: Records = {}

    def read(v: Any) -> Any:
        if isinstance(v, core.Literal):
            return v.val
        if v not in env:
            run([rearranged[v]])
        return env[v]

    def run(eqns: list[Any]) -> None:
        nonlocal records
        first, ins = eqns[0], [[read(v) for v in eqn.invars] for eqn in eqns]
        rule = RULES.get(first.primitive.name, bind) if any(isinstance(x, Weight) for x in ins[0]) else bind
        with first.ctx.manager, jax.named_scope(str(first.source_info.name_stack)):
            outs, new = _matmuls(eqns, ins, on_dots) if len(eqns) > 1 else rule(first, ins[0], on_dots)
        records = merge(records, new)
        env.update(zip([v for eqn in eqns for v in eqn.outvars], outs, strict=True))

    for eqns in groups:
        run(eqns)
    return [read(v) for v in jaxpr.outvars], records


def in_groups(jaxpr: Any, held: set[Any]) -> tuple[dict[Any, Any], list[list[Any]]]:
    """The equations that only rearrange what is `held` as Weights, by their outputs; the others, in their order.

    Those of a group are like matmuls of one input with one Weight each, which need nothing but that input.
    """
    held, rearranged, groups = {*held}, dict[Any, Any](), dict[Any, list[Any]]()
    for eqn in jaxpr.eqns:
        of_weights = [k for k, v in enumerate(eqn.invars) if isinstance(v, core.Var) and v in held]
        if eqn.primitive.name in STRUCTURAL and 0 in of_weights:
            held.add(eqn.outvars[0])
            rearranged[eqn.outvars[0]] = eqn
            continue
        key: Any = id(eqn)
        if eqn.primitive.name == "dot_general" and len(of_weights) == 1:
            k = of_weights[0]
            key = (k, eqn.invars[1 - k], eqn.outvars[0].aval.dtype, *eqn.params.items())
        groups.setdefault(key, []).append(eqn)
    return rearranged, [*groups.values()]


def bind(eqn: Any, ins: list[Any], on_dots: OnDots) -> tuple[list[Any], Records]:
    out = eqn.primitive.bind(*map(dense, ins), **eqn.primitive.get_bind_params(eqn.params))
    return (out if eqn.primitive.multiple_results else [out]), {}


def _structural(eqn: Any, ins: list[Any], on_dots: OnDots) -> tuple[list[Any], Records]:
    weight = ins[0]
    view = STRUCTURAL[eqn.primitive.name](weight.view, eqn.params)
    if view is None:
        return bind(eqn, ins, on_dots)
    if eqn.primitive.name == "slice":
        return _picked(eqn, weight, view, on_dots)
    along = (*weight.varying, *eqn.params["axes"]) if eqn.primitive.name == "pvary" else weight.varying
    return [replace(weight, view=view, dtype=eqn.outvars[0].aval.dtype, varying=along)], {}


def _picked(eqn: Any, weight: Weight, view: View, on_dots: OnDots) -> tuple[list[Any], Records]:
    one = weight
    for depth in range(len(weight.view.stack), len(view.stack)):
        stacked, pick = _in_front(one, view.stack[depth]), view.picks[depth]
        if stacked is None:
            return bind(eqn, [weight], on_dots)
        base = jax.tree.map(lambda a, pick=pick: a[pick], stacked)
        one = replace(one, base=base, view=replace(one.view, stack=view.stack[: depth + 1]))
    return [replace(one, view=view)], {}


def _matmul(eqn: Any, ins: list[Any], on_dots: OnDots) -> tuple[list[Any], Records]:
    return _matmuls([eqn], [ins], on_dots)


def _matmuls(eqns: list[Any], ins: list[list[Any]], on_dots: OnDots) -> tuple[list[Any], Records]:
    """Products of one input, with one call of the hook; those that are no matmuls with a Weight are bound."""
    read = {j: found for j, found in enumerate(map(_with_weight, eqns, ins)) if found is not None}
    outs = {j: bind(eqns[j], ins[j], on_dots)[0][0] for j in range(len(eqns)) if j not in read}
    records: Records = {}
    if read:
        j, (m, w) = next(iter(read.items()))
        x, *sizes = ins[j][1 - m.w], *ins[j][2:]
        rows = m.rows(x)
        places = rows.shape[: len(m.batch) + len(m.tokens)]
        lead = () if m.grouped else w.read.seen[:-2]
        flat = rows.reshape(*lead, *places[len(m.batch) :], -1)
        weights = [w for _, w in read.values()]
        products, records = on_dots(weights, flat, sizes[0] if sizes else None, wider(x, eqns[j]))
        for (j, (m, w)), y in zip(read.items(), products, strict=True):
            y = y.reshape(*places, *(w.view.seen[k] for k in m.w_free)).transpose(m.order)
            outs[j] = y.astype(eqns[j].outvars[0].aval.dtype)
    return [outs[j] for j in range(len(eqns))], records


def _with_weight(eqn: Any, ins: list[Any]) -> tuple[Matmul, Weight] | None:
    """The matmul that an equation is with the one operand that is a Weight, and how it reads that."""
    of_weights = [k for k, x in enumerate(ins) if isinstance(x, Weight)]
    if len(of_weights) != 1:
        return None
    m = matmul(eqn.primitive.name, eqn.params, [v.aval.shape for v in eqn.invars], of_weights[0])
    if m is None:
        return None
    w = ins[m.w]
    layout = w.view.layout(m.w_batch, m.w_contracted)
    return None if w.view.matrix_cuts(layout) is None else (m, replace(w, layout=layout))


def _call(eqn: Any, ins: list[Any], on_dots: OnDots) -> tuple[list[Any], Records]:
    return evaluate(body_of_call(eqn.params), ins, on_dots)


def _remat(eqn: Any, ins: list[Any], on_dots: OnDots) -> tuple[list[Any], Records]:
    weights = {k: x for k, x in enumerate(ins) if isinstance(x, Weight)}

    @ft.partial(jax.checkpoint, policy=eqn.params.get("policy"), prevent_cse=eqn.params.get("prevent_cse", True))
    def body(bases: dict[int, Any], arrays: dict[int, Array]) -> tuple[list[Any], Records]:
        args = {k: replace(w, base=bases[k]) for k, w in weights.items()} | arrays
        outs, records = evaluate(eqn.params["jaxpr"], [args[k] for k in range(len(ins))], on_dots)
        return list(map(dense, outs)), records

    arrays = {k: x for k, x in enumerate(ins) if k not in weights}
    return body({k: w.base for k, w in weights.items()}, arrays)


def _scan(eqn: Any, ins: list[Any], on_dots: OnDots) -> tuple[list[Any], Records]:
    p = eqn.params
    n, k = scan_split(p)
    consts, carry, xs = ins[:n], [dense(x) for x in ins[n : n + k]], ins[n + k :]
    xs = [x if isinstance(x, Weight) and _in_front(x, x.view.layers) is not None else dense(x) for x in xs]
    slices = [_in_front(x, x.view.layers) if isinstance(x, Weight) else x for x in xs]
    stacked = {x.name for x in xs if isinstance(x, Weight)}

    def body(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any], Records, Records]:
        inside = [
            replace(x, base=part, view=x.view.slice) if isinstance(x, Weight) else part
            for x, part in zip(xs, slices, strict=True)
        ]
        outs, records = evaluate(p["jaxpr"], [*consts, *carry, *inside], on_dots)
        own = {key: r for key, r in records.items() if key[0] in stacked}
        outs = list(map(dense, outs))
        return outs[:k], outs[k:], own, {key: r for key, r in records.items() if key[0] not in stacked}

    shared = (
        _none_recorded(lambda: body(carry, jax.tree.map(lambda a: a[0], slices))[-1], consts) if p["length"] else {}
    )

    def step(state: tuple[list[Any], Records], slices: list[Any]) -> tuple[Any, tuple[list[Any], Records]]:
        carry, ys, own, new = body(state[0], slices)
        return (carry, merge(state[1], new)), (ys, own)

    (carry, shared), (ys, own) = lax.scan(step, (carry, shared), slices, p["length"], p["reverse"], p["unroll"])
    return [*carry, *ys], own | shared


def _in_front(x: Weight, k: int | None) -> Any:
    """The param with its axis k in front; None where it has no such axis of layers."""
    if k is None or not is_quantized(x.base):
        return None if k is None else jnp.moveaxis(x.base, k, 0)
    layout, depth = x.base.layout, len(x.view.stack)
    stack = (layout.stack if layout else ()) or (0,) * (depth + 1)
    is_stacked = x.base.scales.ndim > 2 + (layout.n_lead if layout else 0)
    return x.base if is_stacked and stack[depth : depth + 1] == (k,) else None


def _while(eqn: Any, ins: list[Any], on_dots: OnDots) -> tuple[list[Any], Records]:
    p = eqn.params
    n, m = p["cond_nconsts"], p["body_nconsts"]
    of_cond, of_body, carry = list(map(dense, ins[:n])), ins[n : n + m], list(map(dense, ins[n + m :]))

    def body(carry: list[Any]) -> tuple[list[Any], Records]:
        outs, records = evaluate(p["body_jaxpr"], [*of_body, *carry], on_dots)
        return list(map(dense, outs)), records

    def goes_on(state: tuple[list[Any], Records]) -> Array:
        return evaluate(p["cond_jaxpr"], [*of_cond, *state[0]], on_dots)[0][0]

    def step(state: tuple[list[Any], Records]) -> tuple[list[Any], Records]:
        outs, new = body(state[0])
        return outs, merge(state[1], new)

    return lax.while_loop(goes_on, step, (carry, _none_recorded(lambda: body(carry)[1], of_body)))


def _cond(eqn: Any, ins: list[Any], on_dots: OnDots) -> tuple[list[Any], Records]:
    which, operands = ins[0], ins[1:]

    def taken(branch: Any) -> tuple[list[Any], Records]:
        outs, records = evaluate(branch, operands, on_dots)
        return list(map(dense, outs)), records

    branches = [ft.partial(taken, branch) for branch in eqn.params["branches"]]
    none: Records = {}
    for branch in branches:
        none |= _none_recorded(lambda branch=branch: branch()[1], operands)

    def padded(branch: Callable[[], Any]) -> tuple[list[Any], Records]:
        outs, records = branch()
        return outs, none | records

    return lax.switch(dense(which), [ft.partial(padded, branch) for branch in branches])


def _none_recorded(recorded: Callable[[], Records], operands: list[Any]) -> Records:
    """Zeros like what is recorded where `operands` go: what loops and branches start from."""
    if not any(isinstance(x, Weight) for x in operands):
        return {}
    return jax.tree.map(lambda r: vary(jnp.zeros(r.shape, r.dtype), varying(r)), jax.eval_shape(recorded))


RULES = dict.fromkeys(STRUCTURAL, _structural) | dict.fromkeys(CALLS, _call)
RULES |= dict.fromkeys(REMAT, _remat) | {"scan": _scan, "while": _while, "cond": _cond}
RULES |= dict.fromkeys(MATMULS, _matmul)

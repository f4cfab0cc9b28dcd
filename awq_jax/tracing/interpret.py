"""Runs a jaxpr with some of its arguments held as `Weight`s: rearranged only on paper, multiplied only by a hook.

Equations without a Weight are bound as they are. Control flow that a Weight enters is emitted again through the
public functions (`lax.scan`, `jax.checkpoint`), so any pytree may stand where the weight stood. The hook of a matmul
is told of those that will read the same input, and may answer for them too.
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

    `varying` are the mesh axes along which it is said to differ, inside a shard_map. `beside` are those that the same
    input is multiplied with later, likewise.
    """

    name: str
    base: Any
    view: View
    dtype: Any
    varying: tuple[str, ...] = ()
    beside: tuple[Weight, ...] = ()

    def matrix(self, layout: Layout) -> QuantizedTensor | None:
        """The param, if it is quantized and stored as the matrix that `layout` makes of it."""
        stored = is_quantized(self.base) and self.base.layout == (None if layout.is_matrix else layout)
        return self.base if stored else None

    @property
    def cuts(self) -> tuple[str, ...]:
        """The mesh axes that cut the param, inside a shard_map."""
        return names_in(self.view.cuts)

    def whole_input(self, layout: Layout, x: Array) -> Array:
        """All channels of the input x (*tokens, i) of a matmul with a shard of the param."""
        names = names_in((self.view.matrix_cuts(layout) or ((), ()))[-2:-1])
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
OnDot = Callable[[Weight, Layout, Array, Array | None, Any], Products]
"""`(weight, layout, x, None, dtype) -> ([y], records)`: x (*lead, *tokens, i), y (*lead, *tokens, o); records add up.

Behind y may be the products of x with the first of `weight.beside`, of which nothing is recorded.

`(weight, layout, x, sizes, dtype)` multiplies sorted rows: of x (rows, i), the first sizes[0] belong to the first
expert. y has the dtype, or x's where that is None.
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


def evaluate(jaxpr: Any, args: list[Any], on_dot: OnDot) -> tuple[list[Any], Records]:
    """The outputs of a (closed) jaxpr, and what `on_dot` recorded on the way."""
    consts = getattr(jaxpr, "consts", ())
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))
    read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
    records: Records = {}
    dots = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    rearranged = {eqn.outvars[0]: eqn for eqn in jaxpr.eqns if eqn.primitive.name in STRUCTURAL}

    def run(eqn: Any) -> None:
        nonlocal records
        ins = [read(v) for v in eqn.invars]
        rule = RULES.get(eqn.primitive.name, bind) if any(isinstance(x, Weight) for x in ins) else bind
        others = [e for e in dots if e is not eqn and e.outvars[0] not in env] if rule is _matmul else []
        later = _of_same_input(eqn, ins, others, ahead) if others else {}
        ins = [replace(x, beside=tuple(later.values())) if later and isinstance(x, Weight) else x for x in ins]
        with eqn.ctx.manager, jax.named_scope(str(eqn.source_info.name_stack)):
            outs, new = rule(eqn, ins, on_dot)
        records = merge(records, new)
        env.update(zip([*eqn.outvars, *later], outs, strict=not later))

    def ahead(v: Any) -> Any:
        """What v is, also before its turn if it is a Weight that is rearranged; None if it is not known yet."""
        if isinstance(v, core.Literal):
            return v.val
        if v not in env and v in rearranged and isinstance(ahead(rearranged[v].invars[0]), Weight):
            run(rearranged[v])
        return env.get(v)

    for eqn in jaxpr.eqns:
        if not eqn.outvars or eqn.outvars[0] not in env:
            run(eqn)
    return [read(v) for v in jaxpr.outvars], records


def _of_same_input(eqn: Any, ins: list[Any], others: list[Any], ahead: Callable[[Any], Any]) -> dict[Any, Weight]:
    """The Weights, of the same spec, of the other matmuls that are like this one and read its input; by their outputs.

    Args:
      ahead: what an operand of another will be.
    """
    m = _normal_form(eqn, ins)
    if m is None:
        return {}
    k = m.w
    matrix = lambda w: w.matrix(w.view.layout(m.w_batch, m.w_contracted)) if isinstance(w, Weight) else None
    if (own := matrix(ins[k])) is None:
        return {}
    same = [e for e in others if e.invars[1 - k] is eqn.invars[1 - k] and e.params == eqn.params]
    weights = {e.outvars[0]: ahead(e.invars[k]) for e in same}
    return {v: w for v, w in weights.items() if (read := matrix(w)) is not None and read.spec == own.spec}


def bind(eqn: Any, ins: list[Any], on_dot: OnDot) -> tuple[list[Any], Records]:
    out = eqn.primitive.bind(*map(dense, ins), **eqn.primitive.get_bind_params(eqn.params))
    return (out if eqn.primitive.multiple_results else [out]), {}


def _structural(eqn: Any, ins: list[Any], on_dot: OnDot) -> tuple[list[Any], Records]:
    weight = ins[0]
    view = STRUCTURAL[eqn.primitive.name](weight.view, eqn.params)
    if view is None:
        return bind(eqn, ins, on_dot)
    if eqn.primitive.name == "slice":
        return _picked(eqn, weight, view, on_dot)
    along = (*weight.varying, *eqn.params["axes"]) if eqn.primitive.name == "pvary" else weight.varying
    return [replace(weight, view=view, dtype=eqn.outvars[0].aval.dtype, varying=along)], {}


def _picked(eqn: Any, weight: Weight, view: View, on_dot: OnDot) -> tuple[list[Any], Records]:
    one = weight
    for depth in range(len(weight.view.stack), len(view.stack)):
        stacked, pick = _in_front(one, view.stack[depth]), view.picks[depth]
        if stacked is None:
            return bind(eqn, [weight], on_dot)
        base = jax.tree.map(lambda a, pick=pick: a[pick], stacked)
        one = replace(one, base=base, view=replace(one.view, stack=view.stack[: depth + 1]))
    return [replace(one, view=view)], {}


def _matmul(eqn: Any, ins: list[Any], on_dot: OnDot) -> tuple[list[Any], Records]:
    m = _normal_form(eqn, ins)
    if m is None or sum(isinstance(x, Weight) for x in ins) > 1:
        return bind(eqn, ins, on_dot)
    w, x, *sizes = ins[m.w], ins[1 - m.w], *ins[2:]
    layout = w.view.layout(m.w_batch, m.w_contracted)
    if w.view.matrix_cuts(layout) is None:
        return bind(eqn, ins, on_dot)
    rows = m.rows(x)
    places = rows.shape[: len(m.batch) + len(m.tokens)]
    lead = () if m.grouped else layout.seen[:-2]
    flat = rows.reshape(*lead, *places[len(m.batch) :], -1)
    outs, records = on_dot(w, layout, flat, sizes[0] if sizes else None, wider(x, eqn))

    def output(out: Array, w: Weight) -> Array:
        out = out.reshape(*places, *(w.view.seen[k] for k in m.w_free)).transpose(m.order)
        return out.astype(eqn.outvars[0].aval.dtype)

    return [output(out, w) for out, w in zip(outs, (w, *w.beside), strict=False)], records


def _normal_form(eqn: Any, ins: list[Any]) -> Matmul | None:
    """What the equation is as a matmul with its first operand that is a Weight."""
    k = next(k for k, x in enumerate(ins) if isinstance(x, Weight))
    return matmul(eqn.primitive.name, eqn.params, [v.aval.shape for v in eqn.invars], k)


def _call(eqn: Any, ins: list[Any], on_dot: OnDot) -> tuple[list[Any], Records]:
    return evaluate(body_of_call(eqn.params), ins, on_dot)


def _remat(eqn: Any, ins: list[Any], on_dot: OnDot) -> tuple[list[Any], Records]:
    weights = {k: x for k, x in enumerate(ins) if isinstance(x, Weight)}

    @ft.partial(jax.checkpoint, policy=eqn.params.get("policy"), prevent_cse=eqn.params.get("prevent_cse", True))
    def body(bases: dict[int, Any], arrays: dict[int, Array]) -> tuple[list[Any], Records]:
        args = {k: replace(w, base=bases[k]) for k, w in weights.items()} | arrays
        outs, records = evaluate(eqn.params["jaxpr"], [args[k] for k in range(len(ins))], on_dot)
        return list(map(dense, outs)), records

    arrays = {k: x for k, x in enumerate(ins) if k not in weights}
    return body({k: w.base for k, w in weights.items()}, arrays)


def _scan(eqn: Any, ins: list[Any], on_dot: OnDot) -> tuple[list[Any], Records]:
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
        outs, records = evaluate(p["jaxpr"], [*consts, *carry, *inside], on_dot)
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


def _while(eqn: Any, ins: list[Any], on_dot: OnDot) -> tuple[list[Any], Records]:
    p = eqn.params
    n, m = p["cond_nconsts"], p["body_nconsts"]
    of_cond, of_body, carry = list(map(dense, ins[:n])), ins[n : n + m], list(map(dense, ins[n + m :]))

    def body(carry: list[Any]) -> tuple[list[Any], Records]:
        outs, records = evaluate(p["body_jaxpr"], [*of_body, *carry], on_dot)
        return list(map(dense, outs)), records

    def goes_on(state: tuple[list[Any], Records]) -> Array:
        return evaluate(p["cond_jaxpr"], [*of_cond, *state[0]], on_dot)[0][0]

    def step(state: tuple[list[Any], Records]) -> tuple[list[Any], Records]:
        outs, new = body(state[0])
        return outs, merge(state[1], new)

    return lax.while_loop(goes_on, step, (carry, _none_recorded(lambda: body(carry)[1], of_body)))


def _cond(eqn: Any, ins: list[Any], on_dot: OnDot) -> tuple[list[Any], Records]:
    which, operands = ins[0], ins[1:]

    def taken(branch: Any) -> tuple[list[Any], Records]:
        outs, records = evaluate(branch, operands, on_dot)
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

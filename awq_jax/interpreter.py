"""Runs a jaxpr with some of its arguments held as `Weight`s: rearranged only on paper, multiplied only by a hook.

Equations without a Weight are bound as they are. Control flow that a Weight enters is emitted again through the
public functions (`lax.scan`, `jax.checkpoint`), so any pytree may stand where the weight stood.
"""

from __future__ import annotations

import functools as ft
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jaxtyping import Array

from awq_jax.compat import scan_split
from awq_jax.gauge import CALLS
from awq_jax.tensor import Layout, is_quantized
from awq_jax.views import STRUCTURAL, View

Records = dict[str, Any]


@dataclass(frozen=True)
class Weight:
    """The param `name` (dense or quantized) as the traced function sees it, through `view`."""

    name: str
    base: Any
    view: View
    dtype: Any

    def dense(self) -> Array:
        base = self.base.dequantize() if is_quantized(self.base) else self.base
        return self.view.apply(base).astype(self.dtype)


OnDot = Callable[[Weight, Layout, Array], tuple[Array, Records]]
"""`(weight, layout, x) -> (y, records)`: x (*lead, *tokens, i), y (*lead, *tokens, o); records are summed pytrees."""


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
    for eqn in jaxpr.eqns:
        ins = [read(v) for v in eqn.invars]
        rule = RULES.get(eqn.primitive.name, _bind) if any(isinstance(x, Weight) for x in ins) else _bind
        with eqn.ctx.manager, jax.named_scope(str(eqn.source_info.name_stack)):
            outs, new = rule(eqn, ins, on_dot)
        records = merge(records, new)
        env |= zip(eqn.outvars, outs, strict=True)
    return [read(v) for v in jaxpr.outvars], records


def _bind(eqn: Any, ins: list[Any], on_dot: OnDot) -> tuple[list[Any], Records]:
    out = eqn.primitive.bind(*map(dense, ins), **eqn.primitive.get_bind_params(eqn.params))
    return (out if eqn.primitive.multiple_results else [out]), {}


def _structural(eqn: Any, ins: list[Any], on_dot: OnDot) -> tuple[list[Any], Records]:
    weight = ins[0]
    view = STRUCTURAL[eqn.primitive.name](weight.view, eqn.params)
    if view is None:
        return _bind(eqn, ins, on_dot)
    return [Weight(weight.name, weight.base, view, eqn.outvars[0].aval.dtype)], {}


def _dot_general(eqn: Any, ins: list[Any], on_dot: OnDot) -> tuple[list[Any], Records]:
    x, y = ins
    if isinstance(x, Weight) and isinstance(y, Weight):
        return _bind(eqn, ins, on_dot)
    (cx, cy), (bx, by) = eqn.params["dimension_numbers"]
    weight_first = isinstance(x, Weight)
    w, x, cw, c, bw, b = (x, y, cx, cy, bx, by) if weight_first else (y, x, cy, cx, by, bx)
    layout = w.view.layout(bw, cw)
    tokens = [k for k in range(x.ndim) if k not in c and k not in b]
    free = [k for k in range(len(w.view.axes)) if k not in cw and k not in bw]
    lead = [layout.sizes[a] for a in layout.order[: layout.n_lead]]
    token_shape = [x.shape[k] for k in tokens]
    flat = x.transpose(*b, *tokens, *c).reshape(*lead, *token_shape, -1)
    out, records = on_dot(w, layout, flat)
    n_b, n_t, n_f = len(b), len(tokens), len(free)
    out = out.reshape([*(x.shape[k] for k in b), *token_shape, *(w.view.shape[k] for k in free)])
    if weight_first:
        out = out.transpose(*range(n_b), *range(n_b + n_t, n_b + n_t + n_f), *range(n_b, n_b + n_t))
    return [out.astype(eqn.outvars[0].aval.dtype)], records


def _call(eqn: Any, ins: list[Any], on_dot: OnDot) -> tuple[list[Any], Records]:
    return evaluate(eqn.params.get("jaxpr") or eqn.params["call_jaxpr"], ins, on_dot)


def _remat(eqn: Any, ins: list[Any], on_dot: OnDot) -> tuple[list[Any], Records]:
    weights = {k: x for k, x in enumerate(ins) if isinstance(x, Weight)}

    @ft.partial(jax.checkpoint, policy=eqn.params.get("policy"), prevent_cse=eqn.params.get("prevent_cse", True))
    def body(bases: dict[int, Any], arrays: dict[int, Array]) -> tuple[list[Any], Records]:
        args = {k: Weight(w.name, bases[k], w.view, w.dtype) for k, w in weights.items()} | arrays
        outs, records = evaluate(eqn.params["jaxpr"], [args[k] for k in range(len(ins))], on_dot)
        return list(map(dense, outs)), records

    arrays = {k: x for k, x in enumerate(ins) if k not in weights}
    return body({k: w.base for k, w in weights.items()}, arrays)


def _scan(eqn: Any, ins: list[Any], on_dot: OnDot) -> tuple[list[Any], Records]:
    n, k = scan_split(eqn.params)
    consts, carry, xs = ins[:n], [dense(x) for x in ins[n : n + k]], ins[n + k :]
    whole = [isinstance(x, Weight) and x.view == View.of(x.view.base) for x in xs]
    slices = [x.base if w else dense(x) for x, w in zip(xs, whole, strict=True)]
    sliced_names = {x.name for x, w in zip(xs, whole, strict=True) if w}

    def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], tuple[list[Any], Records]]:
        inside = [
            Weight(full.name, part, View.of(full.view.base[1:]), full.dtype) if w else part
            for full, part, w in zip(xs, x, whole, strict=True)
        ]
        outs, records = evaluate(eqn.params["jaxpr"], [*consts, *carry, *inside], on_dot)
        outs = list(map(dense, outs))
        return outs[:k], (outs[k:], records)

    p = eqn.params
    carry, (ys, records) = lax.scan(step, carry, slices, p["length"], p["reverse"], p["unroll"])
    shared = {name: jax.tree.map(lambda r: r.sum(0), r) for name, r in records.items() if name not in sliced_names}
    return [*carry, *ys], records | shared


RULES = dict.fromkeys(STRUCTURAL, _structural) | dict.fromkeys(CALLS, _call)
RULES |= {"remat2": _remat, "checkpoint": _remat, "remat": _remat, "scan": _scan, "dot_general": _dot_general}

"""A function as a list of operations: its calls inlined, its scans over layers unrolled, no weight in memory.

A jaxpr nests: jit, remat and custom derivatives hold a jaxpr of their own, and a scan over stacked params holds the
one of all layers. Flat, each layer stands by itself and reads its own slices of the params.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jaxtyping import Array

from awq_jax.compat import CALLS, scan_split
from awq_jax.tracing.interpret import bind
from awq_jax.tracing.primitives import STRUCTURAL, body_of_call
from awq_jax.tracing.view import View
from awq_jax.weights.layout import stack_places


@dataclass(frozen=True)
class Param:
    """A leaf of the params, or the layer of it that `picks` takes from its axes of layers, `stack` as in Layout."""

    name: str
    stack: tuple[int, ...] = ()
    picks: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.name + "".join(f"[{k}]" for k in self.picks)

    def of(self, leaf: Any) -> Any:
        """What it is of the whole leaf, which may be anything that can be indexed."""
        if not self.picks:
            return leaf
        picks = dict(zip(stack_places(self.stack), self.picks, strict=True))
        return leaf[tuple(picks.get(k, slice(None)) for k in range(len(leaf.shape)))]


@dataclass(frozen=True)
class Seen:
    """A param through a view, cast to `dtypes` one after the other."""

    param: Param
    view: View
    dtypes: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class Value:
    """An array of the function.

    Args:
      live: it depends on the inputs.
      constant: it depends on neither inputs nor params.
      seen: the param that it is, rearranged at most.
      is_read: it is a param as stored, or a layer of one: no operation gives it.
      known: its number, where it is one of a scan's constants, the layer's index say.
    """

    shape: tuple[int, ...]
    dtype: Any
    live: bool = False
    constant: bool = False
    seen: Seen | None = None
    is_read: bool = False
    known: Any = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def aval(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def of_stored(self, param: Array) -> Array:
        """The value, given its param."""
        for dtype in self.seen.dtypes if self.seen else ():
            param = param.astype(dtype)
        return param.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Constant:
    """A literal, or an array that the function has captured."""

    value: Any

    @cached_property
    def text(self) -> str:
        is_key = jnp.issubdtype(jnp.result_type(self.value), jax.dtypes.extended)
        a = np.asarray(jax.random.key_data(self.value) if is_key else self.value)
        return f"{a.dtype}{a.shape}{hashlib.sha256(a.tobytes()).hexdigest()}"


Atom = Value | Constant


@dataclass(frozen=True, eq=False)
class Operation:
    """`run(*ins)` gives the outs; `text` is the same for operations that do the same."""

    run: Callable[..., Sequence[Any]]
    text: str
    ins: tuple[Atom, ...]
    outs: tuple[Value, ...]
    has_effects: bool = False

    @property
    def values(self) -> tuple[Value, ...]:
        """The ins that are no constants."""
        return tuple(v for v in self.ins if isinstance(v, Value))


@dataclass(frozen=True)
class Flat:
    """A function flattened: its operations in order, from `inputs` and params to `outputs`."""

    operations: tuple[Operation, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Atom, ...]


def flatten(jaxpr: Any, names: Sequence[str], whole: Collection[str] = ()) -> Flat:
    """The operations of a closed jaxpr whose first arguments are params of these names.

    Args:
      whole: params that are read as they are, though a scan may slice them.
    """
    params, rest = jaxpr.jaxpr.invars[: len(names)], jaxpr.jaxpr.invars[len(names) :]
    stored = [_stored(Param(name), v.aval.shape, (v.aval.dtype,)) for name, v in zip(names, params, strict=True)]
    inputs = [Value(v.aval.shape, v.aval.dtype, live=True) for v in rest]
    tape = _Tape(whole)
    outputs = tape.inline(jaxpr, [*stored, *inputs])
    return Flat(tuple(tape.operations), tuple(inputs), tuple(outputs))


def _stored(param: Param, shape: Sequence[int], dtypes: tuple[Any, ...]) -> Value:
    """A param, or a layer of it, as an operation reads it."""
    view = View.of(shape, param.stack, param.picks)
    return Value(tuple(shape), dtypes[-1], seen=Seen(param, view, dtypes), is_read=True)


@dataclass
class _Tape:
    whole: Collection[str]
    operations: list[Operation] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)

    def inline(self, jaxpr: Any, args: Sequence[Atom]) -> list[Atom]:
        """Write the operations of a (closed) jaxpr; its outputs."""
        consts = getattr(jaxpr, "consts", ())
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        env: dict[Any, Atom] = dict(zip(jaxpr.constvars, map(Constant, consts), strict=True))
        env |= zip(jaxpr.invars, args, strict=True)
        read = lambda v: Constant(v.val) if isinstance(v, core.Literal) else env[v]
        for eqn in jaxpr.eqns:
            ins, name = [read(v) for v in eqn.invars], eqn.primitive.name
            if name in CALLS:
                outs = self.inline(body_of_call(eqn.params), ins)
            elif name == "scan" and any(map(_is_stack_of_matrices, ins[sum(scan_split(eqn.params)) :])):
                outs = self.unroll(ins, **eqn.params)
            else:
                outs = self.equation(eqn, ins)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: Any, ins: list[Atom]) -> list[Value]:
        """Write an equation; nothing for one that takes a layer of a stacked param."""
        out = [v.aval for v in eqn.outvars]
        before = ins[0].seen if ins and isinstance(ins[0], Value) else None
        seen = _rearranged(eqn, before, out[0].dtype) if before else None
        if before and seen and seen.view.stack != before.view.stack and seen.param.name not in self.whole:
            param = replace(seen.param, stack=seen.view.stack, picks=seen.view.picks)
            return [Value(out[0].shape, out[0].dtype, seen=replace(seen, param=param), is_read=True)]

        def run(*ins: Any) -> Sequence[Any]:
            with eqn.ctx.manager:
                return bind(eqn, list(ins), _none)[0]

        text = self.texts.get(id(eqn)) or _text(eqn)
        self.texts[id(eqn)] = text
        return self.write(run, text, ins, out, seen, has_effects=bool(eqn.effects))

    def write(
        self,
        run: Callable[..., Sequence[Any]],
        text: str,
        ins: Sequence[Atom],
        out: Sequence[Any],
        seen: Seen | None = None,
        **options: Any,
    ) -> list[Value]:
        """Write an operation that gives arrays of the shapes and dtypes of `out`."""
        values = [v for v in ins if isinstance(v, Value)]
        live, constant = any(v.live for v in values), all(v.constant for v in values)
        outs = tuple(Value(tuple(a.shape), a.dtype, live, constant, seen) for a in out)
        self.operations.append(Operation(run, text, tuple(ins), outs, **options))
        return list(outs)

    def unroll(self, ins: list[Atom], *, jaxpr: Any, length: int, reverse: bool, **p: Any) -> list[Atom]:
        """Write a scan's body once for each layer."""
        n, k = scan_split(p)
        # All slices first, so that a layer reads but its own.
        layers = [self.layers(x, length) for x in ins[n + k :]]
        carry, ys = ins[n : n + k], []
        for i in range(length)[:: -1 if reverse else 1]:
            outs = self.inline(jaxpr, [*ins[:n], *carry, *(layer[i] for layer in layers)])
            carry = outs[:k]
            ys.append(outs[k:])
        stacks = [self.stacked(y) for y in zip(*ys[:: -1 if reverse else 1], strict=True)]
        return [*carry, *stacks]

    def layers(self, x: Atom, length: int) -> list[Atom]:
        """What a scan slices from x."""
        if isinstance(x, Constant) or x.constant:
            (array,) = evaluate(needed(self.operations, [x]), [x], {})
            return [Value(a.shape, a.dtype, constant=True, known=a) for a in map(jnp.asarray, array)]
        if x.seen and x.seen.param.name not in self.whole and (axis := x.seen.view.layers) is not None:
            param, view = x.seen.param, x.seen.view.slice
            of = lambda i: Param(param.name, (*param.stack, axis), (*param.picks, i))
            return [_stored(of(i), view.shape, (*x.seen.dtypes, x.dtype)) for i in range(length)]
        slice_of = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        take = lambda i: lambda a: [lax.index_in_dim(a, i, keepdims=False)]
        return [self.write(take(i), f"layer {i}", [x], [slice_of])[0] for i in range(length)]

    def stacked(self, ys: Sequence[Atom]) -> Value:
        one = ys[0].aval if isinstance(ys[0], Value) else jnp.asarray(ys[0].value)
        out = jax.ShapeDtypeStruct((len(ys), *one.shape), one.dtype)
        return self.write(lambda *ys: [jnp.stack(ys)], "stack", ys, [out])[0]


def _is_stack_of_matrices(x: Atom) -> bool:
    return isinstance(x, Value) and not x.live and not x.constant and len(x.shape) > 2


def _rearranged(eqn: Any, seen: Seen, dtype: Any) -> Seen | None:
    """A param after an equation that rearranges or casts it; None after any other."""
    rule = STRUCTURAL.get(eqn.primitive.name)
    view = rule(seen.view, eqn.params) if rule else None
    dtypes = seen.dtypes if dtype == seen.dtypes[-1] else (*seen.dtypes, dtype)
    return None if view is None else Seen(seen.param, view, dtypes)


def _text(eqn: Any) -> str:
    """What an equation does, whatever its variables are called."""
    text = f"{eqn.primitive.name} {sorted((name, str(p)) for name, p in eqn.params.items())}"
    captured = [c for sub in core.jaxprs_in_params(eqn.params) for c in getattr(sub, "consts", ())]
    return text + "".join(Constant(c).text for c in captured)


def _none(*_: Any) -> Any:
    raise AssertionError("no weight is followed here")


def evaluate(operations: Sequence[Operation], wanted: Sequence[Atom], known: dict[Value, Any]) -> list[Any]:
    """The values of `wanted`, by running the operations in order."""
    env = dict(known)
    read = lambda v: v.value if isinstance(v, Constant) else env[v]
    for operation in operations:
        env.update(zip(operation.outs, operation.run(*map(read, operation.ins)), strict=True))
    return [read(v) for v in wanted]


def needed(operations: Sequence[Operation], wanted: Sequence[Atom], *, effects: bool = False) -> list[Operation]:
    """Those of the operations that `wanted` depends on, and perhaps those with effects."""
    missing, kept = {v for v in wanted if isinstance(v, Value)}, []
    for operation in reversed(operations):
        if (effects and operation.has_effects) or missing.intersection(operation.outs):
            kept.append(operation)
            missing |= set(operation.values)
    return kept[::-1]

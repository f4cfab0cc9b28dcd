"""The kernel under jit with sharded operands.

XLA cannot cut a custom call: told nothing, it gathers every operand on every device. Here is how this one is cut.
Rows of x, columns of the weight and experts are independent. Inputs are cut only where whole blocks and whole groups
stay together, then devices add up their products in float32. Where a program runs on one device, or within shard_map,
nothing of this is in it.
"""

from __future__ import annotations

import functools as ft
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from awq_jax.kernels.tiles import BLOCK, WORDS

Kernel = Callable[..., Any]
OPERANDS = ("codes", "scales", "zeros", "input_scale")


def matmul(kernel: Kernel, x: Any, w: Any, *, dtype: Any = None) -> Any:
    """`kernel(x, w, dtype=dtype)`; x, codes, scales and what else the weight has are cut alike."""
    lead = w.codes.ndim - 2
    names = tuple(name for name in OPERANDS if getattr(w, name) is not None)
    experts, rows = math.prod(w.codes.shape[:-2]), math.prod(x.shape[lead:-1])
    stacked = lambda a, tail: a.reshape(experts, *a.shape[a.ndim - tail :])
    operands = [stacked(getattr(w, name), 1 if name == "input_scale" else 2) for name in names]
    y = partitioned(kernel, jax.tree.structure(w), names, w.in_features, dtype)(
        x.reshape(experts, rows, x.shape[-1]), *operands
    )
    return y.reshape(*x.shape[:-1], y.shape[-1])


@ft.cache
def partitioned(kernel: Kernel, structure: Any, names: tuple[str, ...], k: int, dtype: Any) -> Any:
    """`kernel` of x (e, m, k) and the named operands of a weight (e, k, n), with rules for cutting it."""

    def weight(operands: tuple[Any, ...]) -> Any:
        return jax.tree.unflatten(structure, operands)

    @custom_partitioning
    def call(x: Any, *operands: Any) -> Any:
        return kernel(x, weight(operands), dtype=dtype)

    def partition(mesh: Any, arg_shapes: Any, result_shape: Any) -> Any:
        x, codes = spec(arg_shapes[0].sharding, 3), spec(arg_shapes[1].sharding, 3)
        groups, outs = arg_shapes[2].shape[1:]
        experts, rows = arg_shapes[0].shape[:2]
        cut: list[Any] = []

        def first_free(size: int, *wanted: Any) -> Any:
            """The first of the wanted axes that cuts `size` evenly and that nothing else is cut by."""
            for axes in wanted:
                if axes is not None and not set(names_of(axes)) & set(cut) and size % ways(mesh, axes) == 0:
                    cut.extend(names_of(axes))
                    return axes
            return None

        e = first_free(experts, codes[0], x[0])
        n = first_free(outs, codes[2], spec(result_shape.sharding, 3)[2])
        can_cut = k % BLOCK == 0 and groups > 1
        i = first_free(math.gcd(k // BLOCK, groups), codes[1], x[2]) if can_cut else None
        m = first_free(rows, x[1])
        of = {
            "codes": PartitionSpec(e, i, n),
            "scales": PartitionSpec(e, i if groups > 1 else None, n),
            "zeros": PartitionSpec(e, i if groups > 1 else None, n),
            "input_scale": PartitionSpec(e, i),
        }
        specs = (PartitionSpec(e, m, i), *(of[name] for name in names))

        def part(x: Any, *operands: Any) -> Any:
            if i is None:
                return kernel(x, weight(operands), dtype=dtype)
            return lax.psum(kernel(x, weight(operands), dtype=jnp.float32), i).astype(dtype or x.dtype)

        named = lambda p: NamedSharding(mesh, p)
        return mesh, part, named(PartitionSpec(e, m, n)), tuple(named(p) for p in specs)

    def infer(mesh: Any, arg_shapes: Any, result_shape: Any) -> Any:
        del result_shape
        e, m, _ = spec(arg_shapes[0].sharding, 3)
        return NamedSharding(mesh, PartitionSpec(e, m, spec(arg_shapes[1].sharding, 3)[2]))

    def rule(mesh: Any, value_types: Any, result_types: Any) -> Any:
        del mesh, result_types
        groups = value_types[2].shape[1]
        blocks = value_types[1].shape[1]
        split = k % BLOCK == 0 and blocks > 1
        same = split and groups in (blocks, 2 * blocks, 4 * blocks)
        sizes = {"r": WORDS}
        if same:
            sizes |= {"c": BLOCK} | ({"h": groups // blocks} if groups > blocks else {})
        scale = ("e (p h) n" if groups > blocks else "e p n") if same else "e g n"
        of = {
            "codes": "e p (n r)",
            "scales": scale,
            "zeros": scale,
            "input_scale": "e (p c)" if same else "e k",
        }
        left = ", ".join(["e m (p c)" if same else "e m k", *(of[name] for name in names)])
        return f"{left} -> e m n", sizes

    call.def_partition(partition=partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    return call


def spec(sharding: Any, ndim: int) -> tuple[Any, ...]:
    """Which mesh axes cut each axis."""
    axes = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
    return (*axes, *(None,) * (ndim - len(axes)))


def names_of(axis: Any) -> tuple[str, ...]:
    """The mesh axes that an entry of a PartitionSpec, or an axis_name, stands for."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def ways(mesh: Any, axes: Any) -> int:
    """Into how many parts these mesh axes cut."""
    return math.prod(mesh.shape[name] for name in names_of(axes))

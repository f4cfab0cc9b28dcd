"""The kernels under jit with sharded operands.

XLA cannot cut a custom call: told nothing, it gathers every operand on every device. Here is how these are cut.
Rows of x, columns of the weight and experts are independent. Inputs are cut only where whole blocks and whole groups
stay together, then devices add up their products in float32; so they do where experts of sorted rows are cut, of which
each device multiplies its own and has zeros for the others. Where a program runs on one device, or within shard_map,
nothing of this is in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from awq_jax.kernels.gpu import for_each_architecture
from awq_jax.kernels.packing.tiles import BLOCK, WORDS

Kernel = Callable[..., Any]
OPERANDS = ("codes", "scales", "zeros", "input_scale")


def matmul(kernel: Kernel, x: Any, w: Any, *, dtype: Any = None) -> Any:
    """`kernel(x, w, dtype=dtype)`; x, codes, scales and what else the weight has are cut alike."""
    lead = w.codes.ndim - 2
    experts, rows = math.prod(w.codes.shape[:-2]), math.prod(x.shape[lead:-1])
    stacked = jax.tree.map(lambda leaf: leaf.reshape(experts, *leaf.shape[lead:]), w)
    y = _matmul(kernel, "e m", x.reshape(experts, rows, x.shape[-1]), stacked, dtype=dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def grouped_matmul(kernel: Kernel, x: Any, w: Any, group_sizes: Any, *, dtype: Any = None) -> Any:
    """`kernel(x, w, group_sizes, dtype=dtype)` of sorted rows, cut likewise."""
    return _matmul(kernel, "m", x, w, group_sizes, dtype=dtype)


def _matmul(kernel: Kernel, tokens: str, x: Any, w: Any, *group_sizes: Any, dtype: Any) -> Any:
    names = tuple(name for name in OPERANDS if getattr(w, name) is not None)
    call = partitioned(kernel, tokens, jax.tree.structure(w), names, w.in_features, dtype)
    return call(x, *jax.tree.leaves(w), *group_sizes)


@for_each_architecture
def partitioned(kernel: Kernel, tokens: str, structure: Any, names: tuple[str, ...], k: int, dtype: Any) -> Any:
    """`kernel` with rules for cutting it.

    Its arguments are x (e, m, k) and the named operands of a weight (e, k, n); or, with `tokens` "m" in place of "e m",
    sorted rows (m, k), the operands, and how many rows are each expert's (e,).
    """

    def run(kernel: Kernel, x: Any, operands: tuple[Any, ...], dtype: Any) -> Any:
        w = jax.tree.unflatten(structure, operands[: len(names)])
        return kernel(x, w, *operands[len(names) :], dtype=dtype)

    @custom_partitioning
    def call(x: Any, *operands: Any) -> Any:
        return run(kernel, x, operands, dtype)

    def partition(mesh: Any, arg_shapes: Any, result_shape: Any) -> Any:
        *x_lead, x_rows, x_in = spec(arg_shapes[0])
        codes = spec(arg_shapes[1])
        experts, groups, outs = arg_shapes[2].shape
        cut: list[Any] = []

        def first_free(size: int, *wanted: Any) -> Any:
            """The first of the wanted axes that cuts `size` evenly and that nothing else is cut by."""
            for axes in wanted:
                if axes is not None and not set(names_of(axes)) & set(cut) and size % ways(mesh, axes) == 0:
                    cut.extend(names_of(axes))
                    return axes
            return None

        e = first_free(experts, codes[0], *x_lead)
        n = first_free(outs, codes[2], spec(result_shape)[-1])
        can_cut = k % BLOCK == 0 and groups > 1
        i = first_free(math.gcd(k // BLOCK, groups), codes[1], x_in) if can_cut else None
        m = first_free(arg_shapes[0].shape[-2], x_rows)
        of = {
            "codes": PartitionSpec(e, i, n),
            "scales": PartitionSpec(e, i if groups > 1 else None, n),
            "zeros": PartitionSpec(e, i if groups > 1 else None, n),
            "input_scale": PartitionSpec(e, i),
        }
        is_grouped = tokens == "m"
        lead = (m,) if is_grouped else (e, m)
        specs = (PartitionSpec(*lead, i), *(of[name] for name in names), *[PartitionSpec()] * is_grouped)
        summed = (*names_of(i), *(names_of(e) if is_grouped else ()))
        on_part = of_own_experts(kernel, e, m) if is_grouped else kernel

        def part(x: Any, *operands: Any) -> Any:
            if not summed:
                return run(on_part, x, operands, dtype)
            return lax.psum(run(on_part, x, operands, jnp.float32), summed).astype(dtype or x.dtype)

        named = lambda p: NamedSharding(mesh, p)
        return mesh, part, named(PartitionSpec(*lead, n)), tuple(named(p) for p in specs)

    def infer(mesh: Any, arg_shapes: Any, result_shape: Any) -> Any:
        del result_shape
        return NamedSharding(mesh, PartitionSpec(*spec(arg_shapes[0])[:-1], spec(arg_shapes[1])[2]))

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
        x = f"{tokens} (p c)" if same else f"{tokens} k"
        left = ", ".join([x, *(of[name] for name in names), *["e"] * (tokens == "m")])
        return f"{left} -> {tokens} n", sizes

    call.def_partition(partition=partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    return call


def of_own_experts(kernel: Kernel, e: Any, m: Any) -> Kernel:
    """`kernel` of sorted rows on a device that has its part of the experts, cut by mesh axes e, and of the rows, by m.

    It is given the sizes of all groups. The rows of its experts are turned to the front, where a kernel wants them.
    """

    def run(x: Any, w: Any, group_sizes: Any, *, dtype: Any) -> Any:
        first = lambda axes, each: lax.axis_index(axes) * each if axes else 0
        rows, experts = x.shape[0], w.codes.shape[0]
        own = lambda of_all: lax.dynamic_slice_in_dim(of_all, first(e, experts), experts)
        ends = jnp.clip(jnp.cumsum(jnp.asarray(group_sizes, jnp.int32)) - first(m, rows), 0, rows)
        sizes = jnp.diff(ends, prepend=0)
        before = own(ends - sizes)[0]
        turned = lambda a, by: jnp.roll(a, by, axis=0) if e else a
        return turned(kernel(turned(x, -before), w, own(sizes), dtype=dtype), before)

    return run


def spec(array: Any) -> tuple[Any, ...]:
    """Which mesh axes cut each axis."""
    axes = tuple(array.sharding.spec) if isinstance(array.sharding, NamedSharding) else ()
    return (*axes, *(None,) * (len(array.shape) - len(axes)))


def names_of(axis: Any) -> tuple[str, ...]:
    """The mesh axes that an entry of a PartitionSpec, or an axis_name, stands for."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def ways(mesh: Any, axes: Any) -> int:
    """Into how many parts these mesh axes cut."""
    return math.prod(mesh.shape[name] for name in names_of(axes))

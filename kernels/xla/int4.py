"""The matmul by XLA alone, which reads 4-bit codes where they are: TPUs, and NVIDIA GPUs without the Triton kernels.

Few rows: one product a group, of integers, then y = sum over groups of s * (sum x (q - 8) - (z - 8) * sum x). On a GPU
XLA takes no more than the conversion of the codes into a product, so zero points and steps come after it; what it
writes is a float32 for each row, group and column. Many rows, where that would be more than the dense weight: codes are
made weights before the product, on a TPU within it, on a GPU in memory.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int4

from awq_jax.kernels.arithmetic import in_groups, scaled
from awq_jax.kernels.contract import PackedWeight, sizes
from awq_jax.kernels.gpu import TENSOR_CORES, architecture
from awq_jax.kernels.implementation import Implementation
from awq_jax.kernels.packing.int4 import INT4, MIDDLE
from awq_jax.kernels.tilings.table import Tiling


def refuses(x: Any, w: PackedWeight, tiling: Tiling | None = None) -> str | None:
    """Why XLA cannot read the codes where they are."""
    del x, tiling
    return None if w.packing == INT4.name else f"codes are packed in {w.packing}"


def matmul(x: Float[Array, "*b i"], w: PackedWeight, *, dtype: Any = None) -> Float[Array, "*b o"]:
    """`x @ w`, batched over the weight's leading axes; accumulates in float32. In x's dtype, or the one given.

    Raises:
      NotImplementedError: the codes are packed otherwise.
    """
    if reason := refuses(x, w):
        raise NotImplementedError(reason)
    *lead, groups, _, g = w.codes.shape
    n, rows = len(lead), x.shape[len(lead) : -1]
    whole = jnp.pad(scaled(x, w.input_scale), [(0, 0)] * (x.ndim - 1) + [(0, groups * g - x.shape[-1])])
    by_group = whole.reshape(*lead, *rows, groups, g)
    if not few(math.prod(rows), g, x.dtype):
        last, experts = by_group.ndim - 1, tuple(range(n))
        numbers = (((last - 1, last), (n, n + 1)), (experts, experts))
        y = lax.dot_general(by_group, in_groups(w).astype(x.dtype), numbers, preferred_element_type=jnp.float32)
        return y.astype(dtype or x.dtype)
    # XLA multiplies no batch of 16-bit floats into float32 on a CPU.
    wide = lambda x, codes: products(x.astype(jnp.float32), codes)
    sums = lax.platform_dependent(by_group, w.codes, cpu=wide, default=products)
    of_rows = lambda a: a.astype(jnp.float32).reshape(*lead, *(1 for _ in rows), groups, -1)
    if w.zeros is not None:
        sums -= by_group.astype(jnp.float32).sum(-1, keepdims=True) * (of_rows(w.zeros) - MIDDLE)
    return (sums * of_rows(w.scales)).sum(-2).astype(dtype or x.dtype)


def products(
    x: Float[Array, "*lead *rows groups g"], codes: Int4[Array, "*lead groups o g"]
) -> Float[Array, "*lead *rows groups o"]:
    """Each group of x times its codes, in float32."""
    n, last = codes.ndim - 3, x.ndim - 1
    experts = tuple(range(n))
    numbers = (((n + 2,), (last,)), ((*experts, n), (*experts, last - 1)))
    sums = lax.dot_general(codes.astype(x.dtype), x, numbers, preferred_element_type=jnp.float32)
    return jnp.moveaxis(sums, (n, n + 1), (-2, -1))


def few(rows: int, group: int, dtype: Any) -> bool:
    """Whether the products of all groups are no more bytes than the dense weight in `dtype`: 4 rows / group of them.

    Below compute capability 8.0 XLA makes the weight dense for products of more than one row anyway.
    """
    arch = architecture()
    if arch is not None and arch < TENSOR_CORES:
        return rows == 1
    return 4 * rows <= group * jnp.dtype(dtype).itemsize


def described(x: Any, w: PackedWeight, tiling: Tiling | None) -> str:
    """What XLA does with the codes, in words."""
    del tiling
    _, rows, k, _ = sizes(x, w)
    reads = few(rows, w.spec.group(k), x.dtype)
    return f"plain XLA, {'reads 4-bit codes' if reads else 'makes each weight dense'}"


DIRECT = Implementation("direct", refuses=refuses, matmul=matmul, described=described)

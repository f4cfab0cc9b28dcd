"""The matmul by the kernel in kernel.py: many rows on Hopper GPUs, 4-bit weights in tiles.

It runs where it is asked for by name, and where the table has measured it to be faster than the others.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from awq_jax.kernels.arithmetic import scaled
from awq_jax.kernels.contract import PackedWeight, not_in_tiles, sizes
from awq_jax.kernels.gpu import architecture, multiprocessors
from awq_jax.kernels.implementation import Implementation
from awq_jax.kernels.packing.tiles import BLOCK, WORDS
from awq_jax.kernels.tilings import table
from awq_jax.kernels.tilings.table import Tiling

HOPPER = 90
ROWS, COLUMNS = 8, 64
"""What the rows of x are padded to, and what the columns are a multiple of: copies move whole swizzled tiles.

A warpgroup multiplies so many columns: the rows of a wgmma.
"""


def refuses(x: Any, w: PackedWeight, tiling: Tiling | None = None) -> str | None:
    """Why the kernel cannot multiply w with x."""
    del tiling
    if reason := not_in_tiles(w):
        return reason
    if (arch := architecture()) != HOPPER:
        found = f"the GPU is sm_{arch}" if arch else "no NVIDIA GPU is here"
        return f"{found}, wgmma is an instruction of sm_{HOPPER} alone: leave the choice to the table"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype}, the tensor cores take bfloat16 or float16: cast x"
    k, n = w.in_features, w.scales.shape[-1]
    if k % BLOCK or n % COLUMNS:
        return f"the weight is {k} x {n}, the kernel takes multiples of {BLOCK} x {COLUMNS}"
    group = w.spec.group(k)
    if group < k and BLOCK % group and group % BLOCK:
        return f"groups of {group} begin within a block of {BLOCK} rows at other places each time"
    return None


def stages(t: Tiling, w: PackedWeight, dtype: Any) -> int:
    """How many rounds of a tiling fit into shared memory beside the results that wait to be stored."""
    in_block = max(1, BLOCK // w.spec.group(w.in_features))
    per_column = in_block * (w.scales.dtype.itemsize + (w.zeros is not None))
    results = 2 * t.bn * COLUMNS * dtype.itemsize
    return min(t.stages, (table.limit(HOPPER) - results - 1024) // t.round_on_hopper(per_column))


def matmul(
    x: Float[Array, "*b i"], w: PackedWeight, *, dtype: Any = None, tiling: Tiling | None = None
) -> Float[Array, "*b o"]:
    """`x @ w`, batched over the weight's leading axes; float32 accumulators.

    Args:
      x: bfloat16 or float16; the weight's leading axes are leading axes of x too.
      w: 4 bits, in tiles.
      dtype: of the result; None for x's.
      tiling: None for the table's.

    Raises:
      NotImplementedError: the kernel cannot run this case; the message says why.
    """
    if reason := refuses(x, w):
        raise NotImplementedError(reason)
    # The import takes part of a second, which only programs that use the kernel shall pay.
    from awq_jax.kernels.mosaic import kernel as mosaic_kernels

    blocks, groups = w.codes.shape[-2], w.scales.shape[-2]
    experts, rows, k, n = sizes(x, w)
    dtype = jnp.dtype(dtype or x.dtype)
    if 0 in (experts, rows, n, k):
        return jnp.zeros((*x.shape[:-1], n), dtype)
    t = tiling or table.mosaic_tiling(experts * rows, n, multiprocessors())
    per_group = lambda a: a.reshape(experts, groups, n)
    x3 = scaled(x, w.input_scale).reshape(experts, rows, k)
    y = mosaic_kernels.product(
        jnp.pad(x3, ((0, 0), (0, -rows % ROWS), (0, 0))),
        w.codes.reshape(experts, blocks, n, WORDS),
        per_group(w.scales),
        None if w.zeros is None else per_group(w.zeros),
        group=w.spec.group(k),
        bm=t.bm,
        stages=stages(t, w, dtype),
        programs=multiprocessors(),
        dtype=dtype,
    )
    return y[:, :rows].reshape(*x.shape[:-1], n)


MOSAIC = Implementation(
    "mosaic",
    refuses=refuses,
    matmul=matmul,
    kernels=(table.MOSAIC,),
    worth_timing=lambda tiling, case: case.arch == HOPPER and tiling.bm <= case.m,
    described=lambda x, w, tiling: f"Pallas Mosaic GPU, {tiling.bm} x {tiling.bn}" if tiling else "Pallas Mosaic GPU",
    is_custom_call=True,
)

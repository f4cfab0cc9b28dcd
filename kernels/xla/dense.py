"""The matmul in plain XLA: unpack, scale, multiply. Runs everywhere and is what the kernels are checked against."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from awq_jax.kernels.arithmetic import dequantize, scaled
from awq_jax.kernels.contract import PackedWeight
from awq_jax.kernels.implementation import Implementation
from awq_jax.kernels.tilings.table import DENSE, Tiling


def matmul(
    x: Float[Array, "*b i"], w: PackedWeight, *, dtype: Any = None, tiling: Tiling | None = None
) -> Float[Array, "*b o"]:
    """`x @ w`, batched over the weight's leading axes; accumulates in float32. In x's dtype, or the one given."""
    del tiling
    return dense_matmul(scaled(x, w.input_scale), dequantize(w).astype(x.dtype), dtype=dtype)


def grouped_matmul(
    x: Float[Array, "m i"], w: PackedWeight, group_sizes: Int[Array, " e"], *, dtype: Any = None
) -> Float[Array, "m o"]:
    """Sorted rows, each times its group's matrix; accumulates in float32. In x's dtype, or the one given."""
    dense = dequantize(w)
    if w.input_scale is not None:
        dense = dense * w.input_scale[..., None]
    return dense_grouped_matmul(x, dense.astype(x.dtype), group_sizes, dtype=dtype)


def dense_matmul(x: Float[Array, "*b i"], w: Float[Array, "*lead i o"], *, dtype: Any = None) -> Float[Array, "*b o"]:
    """`x @ w` where the leading axes of w, if any, are the leading axes of x too (experts)."""
    lead = tuple(range(w.ndim - 2))
    numbers = (((x.ndim - 1,), (w.ndim - 2,)), (lead, lead))
    return lax.dot_general(x, w, numbers, preferred_element_type=jnp.float32).astype(dtype or x.dtype)


def dense_grouped_matmul(
    x: Float[Array, "m i"], w: Float[Array, "e i o"], group_sizes: Int[Array, " e"], *, dtype: Any = None
) -> Float[Array, "m o"]:
    """`jax.lax.ragged_dot`, accumulated in float32."""
    return lax.ragged_dot(x, w, group_sizes, preferred_element_type=jnp.float32).astype(dtype or x.dtype)


XLA = Implementation(
    "xla",
    refuses=lambda x, w, tiling=None: None,
    matmul=matmul,
    kernels=(DENSE,),
    worth_timing=lambda tiling, case: case.m >= 256,
    described=lambda x, w, tiling: "plain XLA, makes each weight dense" if tiling else "plain XLA",
)
GROUPED = Implementation("xla", refuses=XLA.refuses, matmul=grouped_matmul)

"""The matmul in plain XLA: unpack, scale, multiply. Runs everywhere and is what the kernels are checked against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from awq_jax.kernels.packing import PACKINGS

if TYPE_CHECKING:
    from awq_jax.kernels.contract import PackedWeight


def unpacked(w: PackedWeight) -> UInt8[Array, "*lead i o"]:
    """The codes of whole groups, whichever way they are packed."""
    codes = PACKINGS[w.packing].unpack(w.codes, w.spec.bits)
    return codes[..., : w.in_features + w.spec.padding(w.in_features), :]


def dequantize(w: PackedWeight) -> Float[Array, "*lead i o"]:
    """`(q - z) * s` in float32, padding dropped, the input scale not applied."""
    dense = in_groups(w)
    *lead, groups, g, o = dense.shape
    return dense.reshape(*lead, groups * g, o)[..., : w.in_features, :]


def in_groups(w: PackedWeight) -> Float[Array, "*lead groups g o"]:
    """`(q - z) * s` in float32 with the padding of the last group, the input scale not applied."""
    codes = unpacked(w)
    *lead, padded, o = codes.shape
    groups = w.scales.shape[-2]
    zeros = w.spec.middle if w.zeros is None else w.zeros[..., :, None, :].astype(jnp.float32)
    steps = codes.reshape(*lead, groups, padded // groups, o).astype(jnp.float32) - zeros
    return steps * w.scales[..., :, None, :].astype(jnp.float32)


def matmul(x: Float[Array, "*b i"], w: PackedWeight, *, dtype: Any = None) -> Float[Array, "*b o"]:
    """`x @ w`, batched over the weight's leading axes; accumulates in float32. In x's dtype, or the one given."""
    return dense_matmul(scaled(x, w.input_scale), dequantize(w).astype(x.dtype), dtype=dtype)


def scaled(x: Float[Array, "*b i"], scale: Float[Array, "*lead i"] | None) -> Float[Array, "*b i"]:
    """x times the input scale, whose leading axes are those of x; in x's dtype."""
    if scale is None:
        return x
    between = (1,) * (x.ndim - scale.ndim)
    wide = np.promote_types(x.dtype, scale.dtype)
    scale = scale.reshape(*scale.shape[:-1], *between, scale.shape[-1])
    return (x.astype(wide) * scale.astype(wide)).astype(x.dtype)


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

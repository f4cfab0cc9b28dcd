"""The arithmetic that all implementations share: a packed weight as the numbers it stands for, and x scaled for it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from awq_jax.kernels.contract import PackedWeight
from awq_jax.kernels.packing import PACKINGS


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


def scaled(x: Float[Array, "*b i"], scale: Float[Array, "*lead i"] | None) -> Float[Array, "*b i"]:
    """x times the input scale, whose leading axes are those of x; in x's dtype."""
    if scale is None:
        return x
    between = (1,) * (x.ndim - scale.ndim)
    wide = np.promote_types(x.dtype, scale.dtype)
    scale = scale.reshape(*scale.shape[:-1], *between, scale.shape[-1])
    return (x.astype(wide) * scale.astype(wide)).astype(x.dtype)

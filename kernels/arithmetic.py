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


def dequantized(codes: Array, steps: Array, zeros: Array | int) -> Array:
    """The weights that codes stand for, `(q - z) * s`.

    Args:
      codes: as numbers of the result's dtype, (*lead, groups, g, o); or of any shape.
      steps: of each group, (*lead, groups, o); or of each weight, of the codes' shape.
      zeros: as steps, or one for all.
    """
    of_each = lambda a: a[..., None, :] if jnp.ndim(a) == codes.ndim - 1 else a
    return (codes - of_each(zeros)) * of_each(steps)


def ungrouped(grouped: Float[Array, "*lead groups g o"], i: int) -> Float[Array, "*lead i o"]:
    """The first `i` rows of all groups, one group after the other."""
    *lead, groups, g, o = grouped.shape
    return grouped.reshape(*lead, groups * g, o)[..., :i, :]


def dequantize(w: PackedWeight) -> Float[Array, "*lead i o"]:
    """`(q - z) * s` in float32, padding dropped, the input scale not applied."""
    return ungrouped(in_groups(w), w.in_features)


def in_groups(w: PackedWeight) -> Float[Array, "*lead groups g o"]:
    """`(q - z) * s` in float32 with the padding of the last group, the input scale not applied."""
    codes = unpacked(w)
    *lead, padded, o = codes.shape
    groups = w.scales.shape[-2]
    zeros = w.spec.middle if w.zeros is None else w.zeros.astype(jnp.float32)
    grouped = codes.reshape(*lead, groups, padded // groups, o).astype(jnp.float32)
    return dequantized(grouped, w.scales.astype(jnp.float32), zeros)


def scaled(x: Float[Array, "*b i"], scale: Float[Array, "*lead i"] | None) -> Float[Array, "*b i"]:
    """x times the input scale, whose leading axes are those of x; in x's dtype."""
    if scale is None:
        return x
    between = (1,) * (x.ndim - scale.ndim)
    wide = np.promote_types(x.dtype, scale.dtype)
    scale = scale.reshape(*scale.shape[:-1], *between, scale.shape[-1])
    return (x.astype(wide) * scale.astype(wide)).astype(x.dtype)

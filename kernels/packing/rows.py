"""Codes of 2 to 8 bits as a dense little-endian bit stream down the input axis.

32 consecutive rows of one column fill `bits` uint32 words: row r of them sits at bits r * bits and up, and
may straddle two words (3, 5, 6, 7 bits). So every width costs exactly its bits and unpacks by shifts alone.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8, UInt32

from awq_jax.kernels.packing.entry import Packing

TOGETHER = 32


def pack(codes: UInt8[Array, "*lead i o"], bits: int) -> UInt32[Array, "*lead w o"]:
    """The words of `codes`; i is a multiple of 32 and w = i * bits / 32."""
    *lead, i, o = codes.shape
    rows = codes.astype(jnp.uint32).reshape(*lead, i // TOGETHER, TOGETHER, o)
    words = []
    for word in range(bits):
        parts = []
        for r in range(TOGETHER):
            shift = r * bits - 32 * word
            if -bits < shift < 32:
                value = rows[..., r, :]
                parts.append(value << shift if shift >= 0 else value >> -shift)
        words.append(sum(parts[1:], parts[0]))
    return jnp.stack(words, axis=-2).reshape(*lead, i // TOGETHER * bits, o)


def unpack(words: UInt32[Array, "*lead w o"], bits: int) -> UInt8[Array, "*lead i o"]:
    """The codes that `pack` stored, i = w * 32 / bits of them down each column."""
    *lead, w, o = words.shape
    rows = words.reshape(*lead, w // bits, bits, o)
    first, shift = np.divmod(np.arange(TOGETHER) * bits, 32)
    low = rows[..., first, :]
    shift = shift.astype(np.uint32).reshape(*[1] * (low.ndim - 2), TOGETHER, 1)
    low = low >> shift
    straddles = shift + bits > 32
    if straddles.any():
        following = rows[..., np.minimum(first + 1, bits - 1), :]
        low = jnp.where(straddles, low | following << np.where(straddles, 32 - shift, 0).astype(np.uint32), low)
    return (low & np.uint32(2**bits - 1)).astype(jnp.uint8).reshape(*lead, w // bits * TOGETHER, o)


ROWS = Packing(
    "rows",
    dtype=jnp.dtype(jnp.uint32),
    bits=range(2, 9),
    together=TOGETHER,
    pack=lambda codes, bits, group: pack(codes, bits),
    unpack=unpack,
    shape=lambda stored, bits: (*stored[:-2], stored[-2] * TOGETHER // bits, stored[-1]),
    refused="codes are packed in rows: call awq_jax.prepare(params) once after loading",
)

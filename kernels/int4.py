"""4-bit codes as XLA reads them without help: an array of int4, by group.

Element (p, r, o) is the code of row p * g + r of column o minus 8, the middle: what a symmetric weight multiplies. XLA
takes such an array into a product as it is; from one of (i, o) that a program reshapes, or from words, it may write the
whole weight to memory first.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int4, UInt8, UInt32

from awq_jax.kernels.packing import pack, unpack

MIDDLE = 8


def to_int4(words: UInt32[Array, "*lead w o"], group: int) -> Int4[Array, "*lead groups g o"]:
    """Canonical 4-bit words in groups of `group` rows, all of them whole."""
    codes = unpack(words, 4)
    *lead, i, o = codes.shape
    return (codes.astype(jnp.int8) - MIDDLE).astype(jnp.int4).reshape(*lead, i // group, group, o)


def unpack_int4(codes: Int4[Array, "*lead groups g o"]) -> UInt8[Array, "*lead i o"]:
    """The codes, 0 to 15, of whole groups."""
    *lead, groups, g, o = codes.shape
    return (codes.astype(jnp.int8) + MIDDLE).astype(jnp.uint8).reshape(*lead, groups * g, o)


def from_int4(codes: Int4[Array, "*lead groups g o"]) -> UInt32[Array, "*lead w o"]:
    """The canonical words; undoes `to_int4`."""
    return pack(unpack_int4(codes), 4)

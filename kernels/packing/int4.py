"""4-bit codes as XLA reads them without help: an array of int4, by group.

Element (p, o, r) is the code of row p * g + r of column o minus 8, the middle: what a symmetric weight multiplies. XLA
takes such an array into a product as it is, and slices it so from a stack of layers; from one of (i, o) that a program
reshapes, or from words, it may write the whole weight to memory first. The axes are those of scales and one more, so
what cuts scales into shards cuts codes too.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int4, UInt8, UInt32

from awq_jax.kernels.packing.rows import pack, unpack

MIDDLE = 8


def to_int4(words: UInt32[Array, "*lead w o"], group: int) -> Int4[Array, "*lead groups o g"]:
    """Canonical 4-bit words in groups of `group` rows, all of them whole."""
    codes = unpack(words, 4)
    *lead, i, o = codes.shape
    return (codes.astype(jnp.int8) - MIDDLE).astype(jnp.int4).reshape(*lead, i // group, group, o).swapaxes(-1, -2)


def unpack_int4(codes: Int4[Array, "*lead groups o g"]) -> UInt8[Array, "*lead i o"]:
    """The codes, 0 to 15, of whole groups."""
    *lead, groups, o, g = codes.shape
    return (codes.astype(jnp.int8) + MIDDLE).astype(jnp.uint8).swapaxes(-1, -2).reshape(*lead, groups * g, o)


def from_int4(codes: Int4[Array, "*lead groups o g"]) -> UInt32[Array, "*lead w o"]:
    """The canonical words; undoes `to_int4`."""
    return pack(unpack_int4(codes), 4)

"""4-bit codes as XLA reads them without help: an array of int4, by group.

Element (p, o, r) is the code of row p * g + r of column o minus 8, the middle: what a symmetric weight multiplies. XLA
takes such an array into a product as it is, and slices it so from a stack of layers; from one of (i, o) that a program
reshapes, or from words, it may write the whole weight to memory first. The axes are those of scales and one more, so
what cuts scales into shards cuts codes too.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int4, UInt8

from awq_jax.kernels.packing.entry import Packing

MIDDLE = 8


def pack_int4(codes: UInt8[Array, "*lead i o"], group: int) -> Int4[Array, "*lead groups o g"]:
    """4-bit codes in groups of `group` rows, all of them whole."""
    *lead, i, o = codes.shape
    return (codes.astype(jnp.int8) - MIDDLE).astype(jnp.int4).reshape(*lead, i // group, group, o).swapaxes(-1, -2)


def unpack_int4(codes: Int4[Array, "*lead groups o g"]) -> UInt8[Array, "*lead i o"]:
    """The codes, 0 to 15, of whole groups."""
    *lead, groups, o, g = codes.shape
    return (codes.astype(jnp.int8) + MIDDLE).astype(jnp.uint8).swapaxes(-1, -2).reshape(*lead, groups * g, o)


INT4 = Packing(
    "int4",
    dtype=jnp.dtype(jnp.int4),
    bits=(4,),
    together=1,
    pack=lambda codes, bits, group: pack_int4(codes, group),
    unpack=lambda codes, bits: unpack_int4(codes),
    shape=lambda stored, bits: (*stored[:-3], stored[-3] * stored[-1], stored[-2]),
    refused="codes are an int4 array, for a machine without the kernels: see `awq-jax doctor`",
)

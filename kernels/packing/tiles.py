"""The kernels' own order of 4-bit codes: what one block of threads reads of a column is contiguous.

Word r of a column's 32 int16 words for block p of 128 rows holds, in nibble j, the code of row 128 p + 32 j + r.
So one mask and no shuffle takes the 32 rows of plane j out of 32 words, every plane lies in one group of any group
size that is a multiple of 32, and 32 words are 64 contiguous bytes. Stored (blocks, o * 32): the words are the last
axis together with the columns, so codes have as many axes as the canonical bit stream, and sharding the columns
shards the last axis.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int16, UInt8, UInt16

from awq_jax.kernels.packing.entry import Packing

BLOCK, PLANE, WORDS = 128, 32, 32
PLANES = BLOCK // PLANE


def shifts(ndim: int) -> UInt16[Array, "*ones 4 1 1"]:
    """Where in a word the nibble of each plane is."""
    return jnp.arange(0, 16, 4, dtype=jnp.uint16).reshape(*[1] * (ndim - 3), 4, 1, 1)


def pack_tiles(codes: UInt8[Array, "*lead i o"]) -> Int16[Array, "*lead blocks o32"]:
    """4-bit codes as tiles; rows that the last block lacks get code 0."""
    *lead, i, o = codes.shape
    codes = jnp.pad(codes, [(0, 0)] * len(lead) + [(0, -i % BLOCK), (0, 0)]).astype(jnp.uint16)
    planes = codes.reshape(*lead, -1, PLANES, PLANE, o)
    tiles = (planes << shifts(planes.ndim)).sum(-3, dtype=jnp.uint16)
    tiles = jax.lax.bitcast_convert_type(tiles, jnp.int16).swapaxes(-1, -2)
    return tiles.reshape(*lead, tiles.shape[-3], o * WORDS)


def unpack_tiles(tiles: Int16[Array, "*lead blocks o32"]) -> UInt8[Array, "*lead i o"]:
    """The codes of all rows, those that complete the last block too."""
    *lead, blocks, o32 = tiles.shape
    words = tiles.reshape(*lead, blocks, o32 // WORDS, WORDS).swapaxes(-1, -2)
    words = jax.lax.bitcast_convert_type(words, jnp.uint16)[..., None, :, :]
    return (words >> shifts(words.ndim) & np.uint16(15)).astype(jnp.uint8).reshape(*lead, blocks * BLOCK, o32 // WORDS)


TILES = Packing(
    "tiles",
    dtype=jnp.dtype(jnp.int16),
    bits=(4,),
    together=BLOCK,
    pack=lambda codes, bits, group: pack_tiles(codes),
    unpack=lambda tiles, bits: unpack_tiles(tiles),
    shape=lambda stored, bits: (*stored[:-2], stored[-2] * BLOCK, stored[-1] // WORDS),
)

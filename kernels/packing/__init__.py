"""The ways to lay codes out in memory: a file and an entry each."""

from awq_jax.kernels.packing.entry import Packing as Packing
from awq_jax.kernels.packing.int4 import INT4 as INT4
from awq_jax.kernels.packing.rows import ROWS as ROWS
from awq_jax.kernels.packing.tiles import TILES as TILES

PACKINGS = {packing.name: packing for packing in (ROWS, TILES, INT4)}

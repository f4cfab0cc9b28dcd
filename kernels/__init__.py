"""Matmuls of an activation with a packed low-bit weight. Knows nothing of models or files.

api.py has the matmuls, chooser.py the implementations among which it chooses: triton/ (sizes of tiles from tilings/),
mosaic/ (for Hopper), xla/int4.py (XLA that reads int4 arrays) and xla/dense.py (XLA that makes the weight dense).
contract.py says what they are given, implementation.py what one consists of, packing/ how codes lie in memory.
"""

from awq_jax.kernels.api import best_packing as best_packing
from awq_jax.kernels.api import grouped_int4_matmul as grouped_int4_matmul
from awq_jax.kernels.api import in_one_launch as in_one_launch
from awq_jax.kernels.api import int4_matmul as int4_matmul
from awq_jax.kernels.api import shared_int4_matmul as shared_int4_matmul
from awq_jax.kernels.arithmetic import dequantize as dequantize
from awq_jax.kernels.arithmetic import unpacked as unpacked
from awq_jax.kernels.contract import PackedWeight as PackedWeight
from awq_jax.kernels.gpu import target as target
from awq_jax.kernels.packing import INT4 as INT4
from awq_jax.kernels.packing import PACKINGS as PACKINGS
from awq_jax.kernels.packing import ROWS as ROWS
from awq_jax.kernels.packing import TILES as TILES
from awq_jax.kernels.packing import Packing as Packing
from awq_jax.kernels.packing.rows import pack as pack
from awq_jax.kernels.packing.rows import unpack as unpack

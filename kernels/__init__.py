"""Matmuls of an activation with a packed low-bit weight. Knows nothing of models or files."""

from awq_jax.kernels.api import PackedWeight as PackedWeight
from awq_jax.kernels.api import grouped_int4_matmul as grouped_int4_matmul
from awq_jax.kernels.api import int4_matmul as int4_matmul
from awq_jax.kernels.packing import pack as pack
from awq_jax.kernels.packing import unpack as unpack
from awq_jax.kernels.reference import dequantize as dequantize

"""Formats in which a quantized weight is a few arrays of a safetensors file: one file each, all entries of a table.

codes.py has what they all say (codes, steps, zero points), bits.py how codes become words, codec.py what an entry is.
"""

from awq_jax.formats.codecs.autoawq import AUTOAWQ as AUTOAWQ
from awq_jax.formats.codecs.codec import Codec as Codec
from awq_jax.formats.codecs.codec import check_fits as check_fits
from awq_jax.formats.codecs.codec import encoded as encoded
from awq_jax.formats.codecs.codes import Codes as Codes
from awq_jax.formats.codecs.codes import codes_of as codes_of
from awq_jax.formats.codecs.codes import tensor_of as tensor_of
from awq_jax.formats.codecs.compressed_tensors import COMPRESSED_TENSORS as COMPRESSED_TENSORS
from awq_jax.formats.codecs.gemv import GEMV, GEMV_FAST, LLM_AWQ
from awq_jax.formats.codecs.gptq import GPTQ as GPTQ
from awq_jax.formats.codecs.gptq import GPTQ_V2 as GPTQ_V2
from awq_jax.formats.codecs.mlx import MLX as MLX

WRITTEN = {codec.name: codec for codec in (AUTOAWQ, COMPRESSED_TENSORS, GPTQ, GPTQ_V2, MLX)}
"""By the name that `format` has for it."""
CODECS = (*WRITTEN.values(), GEMV, GEMV_FAST, LLM_AWQ)
READ: dict[tuple[str, ...], Codec] = {method: codec for codec in CODECS for method in codec.methods}
"""By (tool, layout), as config.json declares it."""

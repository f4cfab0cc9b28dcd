"""awq_jax: activation-aware weight quantization (AWQ, arXiv 2306.00978) as JAX function transformations.

calibration = awq.calibrate(fn, params, batches)          # statistics, never activations
qparams, report = awq.quantize(params, calibration)       # pure, jitted scale search
qfn = awq.quantized(fn)                                   # the same function, low-bit matmuls inside
"""

import os
from importlib.metadata import version
from typing import Any

# transformers says otherwise that it misses torch, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from awq_jax.commands.progress import progress_bar as progress_bar
from awq_jax.formats.orbax import load_params as load_params
from awq_jax.formats.orbax import save_params as save_params
from awq_jax.models.linen import QuantizedDense as QuantizedDense
from awq_jax.pipeline.compare import compare as compare
from awq_jax.pipeline.convert import convert as convert
from awq_jax.pipeline.evaluate import evaluate as evaluate
from awq_jax.pipeline.load import Model as Model
from awq_jax.pipeline.load import load as load
from awq_jax.pipeline.quantize_checkpoint import quantize_checkpoint as quantize_checkpoint
from awq_jax.torch_bridge.from_torch import from_torch as from_torch
from awq_jax.tracing.sites import sites as sites
from awq_jax.transforms.calibrate import Calibration as Calibration
from awq_jax.transforms.calibrate import calibrate as calibrate
from awq_jax.transforms.calibrate import quantized as quantized
from awq_jax.transforms.calibrate import with_moments as with_moments
from awq_jax.transforms.distill import distill as distill
from awq_jax.transforms.mixed_bits import with_average_bits as with_average_bits
from awq_jax.transforms.presets import PRESETS as PRESETS
from awq_jax.transforms.quantize import SiteReport as SiteReport
from awq_jax.transforms.quantize import quantize as quantize
from awq_jax.transforms.recipe import Recipe as Recipe
from awq_jax.transforms.stream import Lazy as Lazy
from awq_jax.transforms.stream import stream as stream
from awq_jax.transforms.tune import tune as tune
from awq_jax.weights.sharding import partition_specs as partition_specs
from awq_jax.weights.spec import QuantSpec as QuantSpec
from awq_jax.weights.spec import Rule as Rule
from awq_jax.weights.tensor import QuantizedTensor as QuantizedTensor
from awq_jax.weights.tensor import dequantize as dequantize
from awq_jax.weights.tensor import dot as dot
from awq_jax.weights.tensor import prepare as prepare

__version__ = version("awq-jax")


LAZY = ("quantize_module", "QuantizedModule", "QuantizedLinear")


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY} - {"Any", "os", "version", "LAZY"})


def __getattr__(name: str) -> Any:
    """What needs flax.nnx, which some pairs of flax and jax versions cannot import, is imported on first use."""
    if name not in LAZY:
        raise AttributeError(f"module 'awq_jax' has no attribute {name!r}")
    import awq_jax.transforms.nnx

    return getattr(awq_jax.transforms.nnx, name)

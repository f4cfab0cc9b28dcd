"""Decoders in flax.linen, one file an architecture.

Each module offers Config (with from_hf), the linen module, hidden, or embed / block / head to run it layer by layer,
init_cache, LAYER_NAMES, OUTER_NAMES and IGNORED (Hugging Face names), load / param / to_names,
param_shapes / stored_shapes / matrix_shapes, and fused (what servers make one matrix of).
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from awq_jax.models import llama as llama


def for_config(hf_config: Mapping[str, Any]) -> ModuleType:
    """The module that computes a checkpoint with this config.json.

    Raises:
      ValueError: no module does.
    """
    modules = (llama,)
    found = hf_config.get("architectures") or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"architectures={reprlib.repr(found)}: expected a list of names.")
    for module in modules:
        if any(module.accepts(hf_config, name) for name in found):
            return module
    window = f" with sliding_window={hf_config['sliding_window']}" if hf_config.get("sliding_window") else ""
    raise ValueError(
        f"architectures={found}{window}: no model here computes that. Supported: "
        f"{'; '.join(m.SUPPORTED for m in modules)}. Read by code of yours, any model that is a function of params "
        "and inputs can be quantized: awq.calibrate, awq.quantize."
    )

"""One decoder in flax.linen, and the families of models that it computes.

`layer` is what differs between models, as data; `decoder` computes it; a Family reads config.json and knows names.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from awq_jax.models.families import FAMILIES
from awq_jax.models.family import Family


def for_config(hf_config: Mapping[str, Any]) -> Family:
    """The family of a checkpoint with this config.json.

    Raises:
      ValueError: there is none.
    """
    found = hf_config.get("architectures") or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"architectures={reprlib.repr(found)}: expected a list of names.")
    known = {name: family for family in FAMILIES for name in family.architectures}
    for name in found:
        if name in known:
            return known[name]
    raise ValueError(
        f"architectures={found}: no model here computes that. Supported: {', '.join(known)}. Read by code of yours, "
        "any model that is a function of params and inputs can be quantized: awq.calibrate, awq.quantize."
    )

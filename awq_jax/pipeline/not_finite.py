"""Where in a model numbers stop being finite."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from awq_jax.pipeline.load import Model, stages


def origin(model: Any, tokens: Int[Array | np.ndarray, "b t"]) -> str:
    """The first part of the model whose output has NaN or infinite numbers: "layer 3"; "" for what is no `Model`."""
    if not isinstance(model, Model):
        return ""
    embed, block, _ = stages(model.module, model.config)
    h = embed(model.outer, jnp.asarray(tokens))
    if not jnp.isfinite(h).all():
        return "the embedding"
    for k in range(model.config.layers):
        h = block(model.params[f"layers_{k}"], h)
        if not jnp.isfinite(h).all():
            return f"layer {k}"
    return "the head"

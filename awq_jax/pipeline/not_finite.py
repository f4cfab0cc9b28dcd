"""Where in a model numbers stop being finite."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from awq_jax.models.decoder import layer_name
from awq_jax.pipeline.load import BLOCK, EMBED, Model


def origin(model: Any, tokens: Int[Array | np.ndarray, "b t"]) -> str:
    """The first part of the model whose output has NaN or infinite numbers: "layer 3"; "" for what is no `Model`."""
    if not isinstance(model, Model):
        return ""
    h = EMBED(model.config, model.outer, jnp.asarray(tokens))
    if not jnp.isfinite(h).all():
        return "the embedding"
    for i, layer in enumerate(model.config.layers):
        h = BLOCK(layer, model.params[layer_name(i)], h)
        if not jnp.isfinite(h).all():
            return f"layer {i}"
    return "the head"

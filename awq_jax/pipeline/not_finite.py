"""Where in a model numbers stop being finite."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from awq_jax.models.decoder import layer_name
from awq_jax.pipeline.bridged_model import BridgedModel
from awq_jax.pipeline.load import BLOCK, EMBED, Model


def origin(model: Any, tokens: Int[Array | np.ndarray, "b t"]) -> str:
    """The first part of the model whose output has NaN or infinite numbers: "layer 3"; "" for what is no `Model`.

    Of a model that transformers' code computes the first param that has such.
    """
    if isinstance(model, BridgedModel):
        finite = lambda w: all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(w))
        return next((name for name, w in model.params.items() if not finite(w)), "")
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

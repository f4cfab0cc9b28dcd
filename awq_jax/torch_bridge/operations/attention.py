"""Attention over all keys at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from awq_jax.torch_bridge.operations.shapes import repeat_interleave
from awq_jax.torch_bridge.operations.table import operation


@operation("scaled_dot_product_attention")
def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    if dropout_p:
        raise NotImplementedError("attention with dropout")
    if enable_gqa:
        key, value = (repeat_interleave(x, query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = jnp.einsum("...te,...se->...ts", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.astype(jnp.float32)
    if is_causal:
        attn_mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    if attn_mask is None:
        weights = jax.nn.softmax(scores, -1)
    else:
        is_bool = attn_mask.dtype == jnp.bool_
        scores = jnp.where(attn_mask, scores, -jnp.inf) if is_bool else scores + attn_mask
        # As torch: a query that sees no key gives zeros.
        blind = jnp.isneginf(scores).all(-1, keepdims=True)
        weights = jnp.where(blind, 0.0, jax.nn.softmax(jnp.where(blind, 0.0, scores), -1))
    return jnp.einsum("...ts,...se->...te", weights.astype(value.dtype), value)

"""Causal attention with grouped heads, and its cache of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from awq_jax.models.layer import Latent, Layer, Norm
from awq_jax.models.linen import QuantizedDense, projections
from awq_jax.models.norm import NormLayer
from awq_jax.models.rope import angles, rotate

Cache = dict[str, Float[Array, "b kv length d"]]


class Attention(nn.Module):
    """With a cache, the keys and values of x stand in it at `position`, else 0, and those before it are seen too."""

    layer: Layer

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h"], cache: Cache | None = None, position: Int[Array, ""] | None = None
    ) -> tuple[Float[Array, "b t h"], Cache | None]:
        c = self.layer
        b, t, _ = x.shape
        q, k, v = qkv(c, x) if c.latent is None else latent_qkv(c, c.latent, x)
        q = q.reshape(b, t, c.kv_heads, -1, c.head_dim).transpose(0, 2, 3, 1, 4)
        k, v = (y.reshape(b, t, c.kv_heads, -1).transpose(0, 2, 1, 3) for y in (k, v))
        if c.rope is not None:
            turn = angles(c.rope, t, position, t if cache is None else cache["k"].shape[2])
            q, k = rotate(q, c.rope, turn), rotate(k, c.rope, turn)
        if cache is not None:
            start = (0, 0, 0 if position is None else position, 0)
            cache = {
                "k": lax.dynamic_update_slice(cache["k"], k.astype(cache["k"].dtype), start),
                "v": lax.dynamic_update_slice(cache["v"], v.astype(cache["v"].dtype), start),
            }
        if cache is None or position is None:
            y = causal_attention(c, q, k, v)
        else:
            y = attend(c, q, cache["k"].astype(q.dtype), cache["v"].astype(q.dtype), position)
        y = y.transpose(0, 3, 1, 2, 4).reshape(b, t, c.heads * c.value_dim)
        return QuantizedDense(c.width, "o" in c.biases, name="o")(y), cache


def qkv(c: Layer, x: Float[Array, "b t h"]) -> Sequence[Float[Array, "b t o"]]:
    """Queries, keys and values of all heads; in a compact method."""
    n, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    if c.fused_qkv is None:
        q, k, v = projections(x, {"q": n, "k": kv, "v": kv}, "q" in c.biases)
    else:
        y = QuantizedDense(n + 2 * kv, "qkv" in c.biases, name="qkv")(x)
        if c.fused_qkv == "by head":
            parts = jnp.split(y.reshape(*x.shape[:2], c.heads, 3 * c.head_dim), 3, -1)
            q, k, v = (part.reshape(*x.shape[:2], n) for part in parts)
        else:
            q, k, v = jnp.split(y, [n, n + kv], -1)
    if c.clip_qkv is not None:
        q, k, v = (y.clip(-c.clip_qkv, c.clip_qkv) for y in (q, k, v))
    return normed(c, q, "q_norm"), normed(c, k, "k_norm"), v


def latent_qkv(c: Layer, how: Latent, x: Float[Array, "b t h"]) -> Sequence[Float[Array, "b t n d"]]:
    """The same of latent attention, the rotated channels first."""
    assert c.rope is not None
    rotated, n, bias = c.rope.rotated, c.heads * c.head_dim, "a" in c.biases
    shape = (*x.shape[:2], c.heads)
    small = Norm()  # Whatever the other norms' eps.
    if how.q_rank is None:
        q, kv = projections(x, {"q": n, "kv_a": how.kv_rank + rotated})
    else:
        q, kv = projections(x, {"q_a": how.q_rank, "kv_a": how.kv_rank + rotated}, bias)
        q = QuantizedDense(n, name="q_b")(NormLayer(small, name="q_a_norm")(q))
    kv, k_turned = jnp.split(kv, [how.kv_rank], -1)
    still = c.head_dim - rotated
    q_still, q_turned = jnp.split(q.reshape(*shape, c.head_dim), [still], -1)
    kv = QuantizedDense(c.heads * (still + how.value_dim), name="kv_b")(NormLayer(small, name="kv_a_norm")(kv))
    k_still, v = jnp.split(kv.reshape(*shape, -1), [still], -1)
    k_turned = jnp.broadcast_to(k_turned[:, :, None], (*shape, rotated))
    return jnp.concatenate([q_turned, q_still], -1), jnp.concatenate([k_turned, k_still], -1), v


def normed(c: Layer, y: Float[Array, "b t o"], name: str) -> Float[Array, "b t o"]:
    """Queries or keys through the norm that the layer has for them, if any; in a compact method."""
    if c.qk_norm is None:
        return y
    heads = y.reshape(*y.shape[:2], -1, c.head_dim) if c.qk_norm == "head" else y
    return NormLayer(c.norm, name=name)(heads).reshape(y.shape)


def causal_attention(
    c: Layer, q: Float[Array, "b kv g t d"], k: Float[Array, "b kv t d"], v: Float[Array, "b kv t d"]
) -> Float[Array, "b kv g t d"]:
    """Row i attends to keys 0 .. i, or those of its window; g query heads share a key-value head.

    In up to 8 slices of rows, each against the keys that it can see: fewer products, and scores that stay in cache.
    """
    t = q.shape[3]
    rows = max(128, -(-t // 8))
    slices = []
    for i in range(0, t, rows):
        first = 0 if c.window is None else max(0, i - c.window + 1)
        seen = slice(first, i + rows)
        slices.append(attend(c, q[:, :, :, i : i + rows], k[:, :, seen], v[:, :, seen], i - first))
    return slices[0] if len(slices) == 1 else jnp.concatenate(slices, axis=3)


def attend(
    c: Layer, q: Float[Array, "b kv g t d"], k: Float[Array, "b kv s d"], v: Float[Array, "b kv s d"], position: Any
) -> Float[Array, "b kv g t d"]:
    """`softmax(q k' * scale) v`, scores and softmax in float32; row i attends to keys 0 .. position + i, or those of
    its window."""
    products = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32)
    behind = position + jnp.arange(q.shape[3])[:, None] - jnp.arange(k.shape[2])[None]
    seen = behind >= 0 if c.window is None else (behind >= 0) & (behind < c.window)
    scores = products * (q.shape[-1] ** -0.5 if c.attention_scale is None else c.attention_scale)
    scores = capped(scores, c.attention_cap)
    scores = jnp.where(seen[None, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
    mixed = jnp.einsum("bkgts,bksd->bkgtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (mixed / weights.sum(-1, keepdims=True)).astype(q.dtype)


def capped(x: Float[Array, "*b"], cap: float | None) -> Float[Array, "*b"]:
    """`cap * tanh(x / cap)`: within the cap, and x where that is far below it."""
    return x if cap is None else cap * jnp.tanh(x / cap)

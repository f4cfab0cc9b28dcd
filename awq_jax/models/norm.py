"""Norms over the last axis."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from awq_jax.models.layer import Norm
from awq_jax.weights.tensor import plus


class NormLayer(nn.Module):
    """What `Norm` says, in float32; x's dtype comes back."""

    norm: Norm

    @nn.compact
    def __call__(self, x: Float[Array, "*b h"]) -> Float[Array, "*b h"]:
        wide = x.astype(jnp.float32)
        wide = wide - wide.mean(-1, keepdims=True) if self.norm.centred else wide
        y = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.norm.eps)
        if self.norm.scaled:
            start = nn.initializers.zeros if self.norm.plus_one else nn.initializers.ones
            scale = self.param("scale", start, (x.shape[-1],)).astype(jnp.float32)
            y = y * jnp.expand_dims(1 + scale if self.norm.plus_one else scale, range(x.ndim - 1))
        if self.norm.bias:
            y = plus(y, self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32))
        return y.astype(x.dtype)

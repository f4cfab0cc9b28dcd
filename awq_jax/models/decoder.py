"""One decoder in flax.linen for every family.

Params are plain dicts: {"embed": {"embedding"}, "layers_0": {...}, ..., "norm": {"scale"}, "head": {"kernel"}}, no
head where it is tied to the embedding. Each kernel may be a QuantizedTensor. A model runs whole (`Decoder`) or as a
stream of pure functions that hold one layer at a time: `embed`, then `block` for each layer, then `head`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from awq_jax.models.attention import Attention, capped
from awq_jax.models.layer import Config, Layer
from awq_jax.models.linen import QuantizedDense
from awq_jax.models.mlp import MLP, MoE
from awq_jax.models.norm import NormLayer
from awq_jax.weights.tensor import dot

Params = Mapping[str, Any]
Cache = dict[str, dict[str, Float[Array, "b kv length d"]]]


class Embed(nn.Module):
    config: Config

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), (c.vocab, c.width))
        if c.learned:
            self.positions = self.param("positions", nn.initializers.normal(0.02), (c.learned, c.width))

    def __call__(self, tokens: Int[Array, "b t"], position: Any = None) -> Float[Array, "b t h"]:
        c = self.config
        x = jnp.take(self.embedding, tokens, axis=0).astype(c.dtype)
        x = x if c.embed_scale == 1 else x * jnp.asarray(c.embed_scale, c.dtype)
        if not c.learned:
            return x
        places = jnp.arange(tokens.shape[1]) + (0 if position is None else position) + c.learned_from
        return x + jnp.take(self.positions, places, axis=0).astype(c.dtype)[None]

    def attend(self, hidden: Float[Array, "*b h"]) -> Float[Array, "*b v"]:
        """Logits of a tied head."""
        return dot(hidden, self.embedding.astype(hidden.dtype).T)


class Block(nn.Module):
    layer: Layer

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h"], cache: Any = None, position: Int[Array, ""] | None = None
    ) -> tuple[Float[Array, "b t h"], Any]:
        c = self.layer
        before, after = c.order != "post", c.order in ("post", "sandwich")
        norm = lambda y, name, there=True: NormLayer(c.norm, name=name)(y) if there else y
        mlp = (MLP if c.experts is None else MoE)(c, name="mlp")
        y = norm(x, "attn_norm", before)
        a, cache = Attention(c, name="attn")(y, cache, position)
        if c.order.startswith("parallel"):
            return x + a + mlp(y if c.order == "parallel" else norm(x, "mlp_norm")), cache
        x = x + scaled(norm(a, "attn_post_norm", after), c.residual)
        return x + scaled(norm(mlp(norm(x, "mlp_norm", before)), "mlp_post_norm", after), c.residual), cache


class Decoder(nn.Module):
    """The whole decoder.

    Example:
      >>> logits = Decoder(config).apply({"params": params}, tokens)
      >>> logits, cache = Decoder(config).apply({"params": params}, prompt, cache=init_cache(config, 1, 256))
      >>> logits, cache = Decoder(config).apply({"params": params}, token, cache=cache, position=prompt.shape[1])
    """

    config: Config

    def setup(self) -> None:
        c = self.config
        self.embed = Embed(c)
        self.layers = [Block(layer) for layer in c.layers]
        self.norm = NormLayer(c.norm)
        if not c.tied:
            self.head = QuantizedDense(c.vocab, c.head_bias)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        cache: Cache | None = None,
        position: Int[Array, ""] | int | None = None,
    ) -> Any:
        """Logits, float32 [b, t, v]; with a cache, (logits, cache).

        Args:
          tokens: stand at `position`, `position + 1`, ...
          cache: keys and values of all tokens before `position`; None where there are none.
          position: where `tokens` start; None is the start of the text, which is also the faster way to fill a
            cache. It may be traced. A cache too short for position + t is overwritten at its end: size it first.
        """
        hidden, cache_out = self.hidden(tokens, cache, position)
        logits = self.logits(hidden)
        return logits if cache is None else (logits, cache_out)

    def hidden(
        self, tokens: Int[Array, "b t"], cache: Cache | None = None, position: Any = None
    ) -> tuple[Float[Array, "b t h"], Cache]:
        """What the last layer gives, before the final norm."""
        x, new = self.embed(tokens, position), {}
        for i, layer in enumerate(self.layers):
            x, new[layer_name(i)] = layer(x, None if cache is None else cache[layer_name(i)], position)
        return x, new

    def logits(self, hidden: Float[Array, "*b h"]) -> Float[Array, "*b v"]:
        """Final norm and head, float32."""
        c, x = self.config, self.norm(hidden)
        y = (self.embed.attend(x) if c.tied else self.head(x)).astype(jnp.float32)
        return capped(scaled(y, c.logit_scale), c.logit_cap)


def embed(config: Config, params: Params, tokens: Int[Array, "b t"]) -> Float[Array, "b t h"]:
    """What enters layer 0; `params` needs "embed" only."""
    return _apply(Embed(config), params["embed"], tokens)


def block(layer: Layer, params: Params, hidden: Float[Array, "b t h"]) -> Float[Array, "b t h"]:
    """One layer on positions 0 .. t-1; jit it with `layer` static and equal layers run the same program."""
    return _apply(Block(layer), params, hidden)[0]


def head(config: Config, params: Params, hidden: Float[Array, "*b h"]) -> Float[Array, "*b v"]:
    """Logits of what the last layer gave, float32; `params` needs "norm" and "head", or "embed" when tied."""
    return _apply(Decoder(config), params, hidden, method="logits")


def hidden(config: Config, params: Params, tokens: Int[Array, "b t"]) -> Float[Array, "b t h"]:
    """What the last layer gives, before the final norm; needs neither that nor a head."""
    return _apply(Decoder(config), params, tokens, method="hidden")[0]


def init_cache(config: Config, batch: int, length: int, dtype: Any = None) -> Cache:
    """An empty cache for `length` positions, {"layers_0": {"k", "v"}, ...}, in `dtype` or else the config's."""
    zeros = lambda c, d: jnp.zeros((batch, c.kv_heads, length, d), config.dtype if dtype is None else dtype)
    of = lambda c: {"k": zeros(c, c.head_dim), "v": zeros(c, c.value_dim)}
    return {layer_name(i): of(c) for i, c in enumerate(config.layers)}


def scaled(x: Float[Array, "*b"], factor: float) -> Float[Array, "*b"]:
    return x if factor == 1 else x * factor


def layer_name(i: int) -> str:
    """What the params of layer i are called."""
    return f"layers_{i}"


def _apply(module: nn.Module, params: Params, *args: Any, **rest: Any) -> Any:
    return module.apply({"params": params}, *args, **rest)

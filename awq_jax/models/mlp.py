"""The MLP of a block: gated or not, one or several experts."""

from __future__ import annotations

import functools as ft
from collections.abc import Callable
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from awq_jax.models.layer import Experts, Layer
from awq_jax.models.linen import ExpertsDense, QuantizedDense, projections

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "relu": nn.relu,
    "relu2": lambda x: jnp.square(nn.relu(x)),
    "gelu": ft.partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_fast": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
}
"""By the names that config.json has for them."""


class MLP(nn.Module):
    layer: Layer

    @nn.compact
    def __call__(self, x: Float[Array, "*b h"]) -> Float[Array, "*b h"]:
        c, act = self.layer, ACTIVATIONS[self.layer.act]
        if not c.gated:
            y = act(QuantizedDense(c.mlp_width, "up" in c.biases, name="up")(x))
        else:
            if c.fused_mlp:
                whole = QuantizedDense(2 * c.mlp_width, "gate_up" in c.biases, name="gate_up")(x)
                gate, up = jnp.split(whole, 2, -1)
            else:
                gate, up = projections(x, {"gate": c.mlp_width, "up": c.mlp_width}, "up" in c.biases)
            y = act(gate) * up
        return QuantizedDense(c.width, "down" in c.biases, name="down")(y)


class MoE(nn.Module):
    layer: Layer

    @nn.compact
    def __call__(self, x: Float[Array, "b t h"]) -> Float[Array, "b t h"]:
        c, e = self.layer, self.layer.experts
        assert e is not None
        rows = x.reshape(-1, c.width)
        correction = self.param("correction", nn.initializers.zeros, (e.n,)) if e.corrected else None
        weights, chosen = routed(e, QuantizedDense(e.n, name="router")(rows), correction)
        y = Chosen(c, name="experts")(rows, chosen)
        y = (y * weights[..., None].astype(y.dtype)).sum(1)
        if e.shared:
            more = MLP(replace(c, mlp_width=e.shared), name="shared")(rows)
            y = y + (nn.sigmoid(QuantizedDense(1, name="shared_gate")(rows)) * more if e.shared_gate else more)
        return y.reshape(x.shape)


class Chosen(nn.Module):
    """What each of the experts that a row has chosen makes of it."""

    layer: Layer

    @nn.compact
    def __call__(self, rows: Float[Array, "n h"], chosen: Int[Array, "n top"]) -> Float[Array, "n top h"]:
        c, e, act = self.layer, self.layer.experts, ACTIVATIONS[self.layer.act]
        assert e is not None
        order = jnp.argsort(chosen.ravel())
        sizes = jnp.bincount(chosen.ravel(), length=e.n).astype(jnp.int32)
        linear = lambda o, name: ExpertsDense(o, experts=e.n, name=name)
        x = rows[order // e.top]
        y = linear(c.width, "down")(act(linear(e.width, "gate")(x, sizes)) * linear(e.width, "up")(x, sizes), sizes)
        return jnp.zeros_like(y).at[order].set(y).reshape(*chosen.shape, c.width)


def routed(
    e: Experts, logits: Float[Array, "n e"], correction: Float[Array, " e"] | None = None
) -> tuple[Float[Array, "n top"], Int[Array, "n top"]]:
    """The weights and numbers of the experts of each row."""
    logits = logits.astype(jnp.float32)
    scores = nn.sigmoid(logits) if e.sigmoid else jax.nn.softmax(logits)
    ranked = scores if correction is None else scores + correction.astype(jnp.float32)[None]
    if e.groups > 1:
        grouped = ranked.reshape(len(ranked), e.groups, -1)
        _, kept = lax.top_k(lax.top_k(grouped, e.best)[0].sum(-1), e.top_groups)
        among = (kept[..., None] == jnp.arange(e.groups)[None, None]).any(1)
        ranked = jnp.where(among[..., None], grouped, -jnp.inf).reshape(ranked.shape)
    _, chosen = lax.top_k(ranked, e.top)
    weights = jnp.take_along_axis(scores, chosen, -1)
    weights = weights / weights.sum(-1, keepdims=True) if e.renormalised else weights
    return weights if e.scale == 1 else weights * e.scale, chosen

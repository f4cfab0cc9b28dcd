"""Models from packages of others, unchanged and tiny: each gives a pure function, random params and inputs.

What is written here is only what every user writes: the constructor, its sizes, and `fn(params, *inputs)`.
"""

from __future__ import annotations

import functools as ft
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS, MLP = 50, 64, 4, 128


@dataclass(frozen=True)
class Public:
    fn: Callable[..., Any]
    params: Any
    inputs: Callable[[int], tuple[Any, ...]]


def tokens(seed: int, batch: int = 4, length: int = 16) -> tuple[np.ndarray]:
    """Without token 0, which some models mask as padding."""
    return (np.random.default_rng(seed).integers(1, VOCAB, (batch, length), dtype=np.int32),)


def images(seed: int) -> tuple[np.ndarray]:
    return (np.random.default_rng(seed).normal(size=(4, 3, 16, 16)).astype(np.float32),)


def hidden(seed: int) -> tuple[np.ndarray]:
    """Some channels are large, as they are in models."""
    scale = np.exp(np.random.default_rng(99).normal(size=WIDTH))
    return ((scale * np.random.default_rng(seed).normal(size=(4, 16, WIDTH))).astype(np.float32),)


def flax_linen_attention() -> Public:
    """flax.linen's attention and Dense, two layers in one nn.scan of nn.remat."""
    import flax.linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(y)
            return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(MLP)(nn.RMSNorm()(x)))), None

    stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
    variables = stack.init(jax.random.key(0), *hidden(0), None)
    return Public(lambda p, x: stack.apply(p, x, None)[0], variables, hidden)


def flax_nnx_attention() -> Public:
    """flax.nnx's attention, Linear and LinearGeneral."""
    from flax import nnx

    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        norm=nnx.RMSNorm(WIDTH, rngs=rngs),
        attention=nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs),
        up=nnx.LinearGeneral(WIDTH, (2, MLP), rngs=rngs),
        down=nnx.Linear(MLP, WIDTH, rngs=rngs),
    )
    graph, state = nnx.split(model)

    def fn(params, x):
        m = nnx.merge(graph, params)
        y = m.norm(x)
        x = x + m.attention(y)
        gate, up = jnp.moveaxis(m.up(x), -2, 0)
        return x + m.down(nnx.silu(gate) * up)

    return Public(fn, nnx.to_pure_dict(state), hidden)


def nanodl_model(name: str, **more: Any) -> Public:
    import nanodl

    sizes = {"num_layers": 1, "num_heads": HEADS, "num_groups": 2, "embed_dim": WIDTH, "hidden_dim": WIDTH}
    sizes |= {"feedforward_dim": WIDTH, "vocab_size": VOCAB, "max_length": 16, "start_token": 0, "end_token": 1}
    model = getattr(nanodl, name)(**sizes, dropout=0.0, **more)
    variables = model.init(jax.random.key(0), *tokens(0))
    return Public(model.apply, variables, tokens)


def nanodl_gemma() -> Public:
    return nanodl_model("Gemma")


def nanodl_mixtral() -> Public:
    return nanodl_model("Mixtral", window_size=8, shift_size=4)


def haiku_transformer() -> Public:
    import haiku as hk
    from examples.transformer.model import LanguageModel, Transformer

    def forward(x):
        layers = Transformer(num_heads=HEADS, num_layers=1, attn_size=16, dropout_rate=0.0)
        return LanguageModel(layers, model_size=WIDTH, vocab_size=VOCAB, pad_token=0)(x)

    model = hk.transform(forward)
    key = jax.random.key(1)
    return Public(lambda p, x: model.apply(p, key, x), model.init(jax.random.key(0), *tokens(0)), tokens)


def equimo_vit() -> Public:
    import equinox as eqx
    from equimo.models import VisionTransformer

    model = VisionTransformer(
        img_size=16,
        in_channels=3,
        dim=WIDTH,
        patch_size=4,
        num_heads=HEADS,
        depths=[1],
        mlp_ratio=2.0,
        num_classes=10,
        key=jax.random.key(0),
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    key = jax.random.key(1)
    fn = lambda p, x: jax.vmap(lambda image: eqx.combine(p, static)(image, key, inference=True))(x)
    return Public(fn, params, images)


def attnax_decoder() -> Public:
    from attnax import TransformerConfig
    from attnax.transformer import TransformerDecoder
    from flax import nnx

    config = TransformerConfig(
        vocab_size=VOCAB,
        d_model=WIDTH,
        num_heads=HEADS,
        num_layers=1,
        d_ff=MLP,
        max_len=16,
        pos_emb_type="rope",
        num_kv_heads=2,
        norm_type="rms",
        ff_activation="swiglu",
    )
    graph, params, rest = nnx.split(TransformerDecoder(nnx.Rngs(0), config), nnx.Param, ...)
    fn = lambda p, x: nnx.merge(graph, p, rest)(x, deterministic=True)
    return Public(fn, nnx.to_pure_dict(params), tokens)


def attnax_experts() -> Public:
    from attnax.feedforward import MixtureOfExperts
    from flax import nnx

    model = MixtureOfExperts(nnx.Rngs(0), d_model=WIDTH, d_ff=MLP, num_experts=3)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    fn = lambda p, x: nnx.merge(graph, p, rest)(x, deterministic=True)[0]
    return Public(fn, nnx.to_pure_dict(params), hidden)


def keras_decoder() -> Public:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((16,), dtype="int32")
    x = keras.layers.Embedding(VOCAB, WIDTH)(x)
    y = keras.layers.RMSNormalization()(x)
    x = x + keras.layers.GroupQueryAttention(WIDTH // HEADS, HEADS, 2)(y, y, use_causal_mask=True)
    y = keras.layers.RMSNormalization()(x)
    y = keras.layers.Dense(MLP, activation="silu")(y) * keras.layers.Dense(MLP)(y)
    x = x + keras.layers.Dense(WIDTH)(y)
    model = keras.Model(inputs, keras.layers.Dense(VOCAB)(keras.layers.LayerNormalization()(x)))
    paths = [v.path for v in model.trainable_variables]
    fn = lambda p, x: model.stateless_call([p[path] for path in paths], [], x)[0]
    return Public(fn, {v.path: v.value for v in model.trainable_variables}, tokens)


def penzai_gemma() -> Public:
    from penzai import pz
    from penzai.models.transformer.variants import llamalike_common as llamalike

    config = llamalike.LlamalikeTransformerConfig(
        num_kv_heads=2,
        query_head_multiplier=2,
        embedding_dim=WIDTH,
        projection_dim=16,
        mlp_hidden_dim=MLP,
        num_decoder_blocks=1,
        vocab_size=VOCAB,
        mlp_variant="geglu_approx",
        tie_embedder_and_logits=True,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
    )
    model = llamalike.build_llamalike_transformer(config, jax.random.key(0))
    static, params = pz.unbind_params(model, freeze=True)

    def fn(params, x):
        bound = pz.bind_variables(static, params.values())
        x = pz.nx.wrap(x).tag("batch", "seq")
        return bound(x, token_positions=pz.nx.arange("seq", 16)).unwrap("batch", "seq", "vocabulary")

    return Public(fn, {p.label: p for p in params}, tokens)


def tunix_model(module: str, name: str, **config: Any) -> Public:
    """A model of google-tunix, whose own __init__ imports its trainers and their many requirements.

    The matrices that it starts at zero are drawn here.
    """
    import importlib
    import sys
    import types

    from flax import nnx
    from wheels import unpacked

    package = types.ModuleType("tunix")
    package.__path__ = [str(unpacked("google-tunix") / "tunix")]
    sys.modules.setdefault("tunix", package)
    of = importlib.import_module(f"tunix.models.{module}.model")
    sizes = {"num_layers": 1, "embed_dim": WIDTH, "hidden_dim": MLP, "num_heads": HEADS, "head_dim": 16}
    model = getattr(of, name)(of.ModelConfig(**sizes | {"num_kv_heads": 2} | config), rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    seen = jnp.tril(jnp.ones((1, 16, 16), bool))

    def fn(params, x):
        positions = jnp.broadcast_to(jnp.arange(16), x.shape)
        return nnx.merge(graph, params)(x, positions=positions, cache=None, attention_mask=seen)[0]

    rng = np.random.default_rng(0)
    draw = lambda w: jnp.asarray(rng.normal(size=w.shape) / w.shape[-2] ** 0.5, w.dtype)
    params = jax.tree.map(lambda w: draw(w) if w.ndim > 1 and not w.any() else w, nnx.to_pure_dict(state))
    return Public(fn, params, tokens)


def tunix_qwen3() -> Public:
    return tunix_model("qwen3", "Qwen3", vocab_size=VOCAB, norm_eps=1e-6, rope_theta=10_000)


def tunix_qwen3_moe() -> Public:
    experts = {"num_experts": 3, "num_experts_per_tok": 2}
    return tunix_model("qwen3", "Qwen3", vocab_size=VOCAB, norm_eps=1e-6, rope_theta=10_000, **experts)


def tunix_gemma3() -> Public:
    return tunix_model("gemma3", "Gemma3", num_embed=VOCAB, sliding_window_size=8)


PUBLIC: dict[str, Callable[[], Public]] = {
    f.__name__: ft.cache(f)
    for f in (
        flax_linen_attention,
        flax_nnx_attention,
        nanodl_gemma,
        nanodl_mixtral,
        haiku_transformer,
        equimo_vit,
        attnax_decoder,
        attnax_experts,
        keras_decoder,
        penzai_gemma,
        tunix_qwen3,
        tunix_qwen3_moe,
        tunix_gemma3,
    )
}

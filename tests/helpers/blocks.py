"""Small functions of several blocks, one a way of building them: what segments and streaming are tried on."""

from __future__ import annotations

import functools as ft
import itertools as it
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from loose import loose
from tiny import config_of, hf_config, random_params
from zoo import (
    HEADS,
    KV_HEADS,
    LAYERS,
    MLP,
    TOKENS,
    VOCAB,
    WIDTH,
    Draw,
    Model,
    attend,
    gated,
    gated_params,
    heads,
    merged,
    moe_scanned,
    rms,
)

from awq_jax.models.decoder import Decoder

INPUT = np.random.default_rng(3).normal(size=(2, 6, WIDTH)).astype(np.float32)


def own_llama(layers: int = 4) -> Model:
    config = config_of(hf_config(num_hidden_layers=layers))
    params = random_params(config)
    return Model(lambda p, tokens: Decoder(config).apply({"params": p}, tokens), params, (TOKENS,))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.RMSNorm()(x)
        x = x + nn.Dense(WIDTH)(nn.silu(nn.Dense(MLP)(y)))
        return x, None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, WIDTH)(tokens)
        stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(VOCAB)(nn.RMSNorm()(stack()(x, None)[0]))


def linen_scanned() -> Model:
    variables = Scanned().init(jax.random.key(0), TOKENS)
    return Model(loose(Scanned().apply), jax.tree.map(np.asarray, variables))


def nnx_blocks() -> Model:
    from flax import nnx

    class Mixer(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
            self.up, self.down = nnx.Linear(WIDTH, MLP, rngs=rngs), nnx.Linear(MLP, WIDTH, rngs=rngs)

        def __call__(self, x):
            return x + self.down(nnx.gelu(self.up(self.norm(x))))

    rngs = nnx.Rngs(0)
    graph, state = nnx.split(nnx.Sequential(*(Mixer(rngs) for _ in range(3))))
    return Model(loose(lambda p, x: nnx.merge(graph, p)(x)), nnx.to_pure_dict(state), (INPUT,))


def equinox_blocks() -> Model:
    import equinox as eqx

    class Mixer(eqx.Module):
        norm: eqx.nn.LayerNorm
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key)
            self.norm = eqx.nn.LayerNorm(WIDTH)
            self.up, self.down = eqx.nn.Linear(WIDTH, MLP, key=keys[0]), eqx.nn.Linear(MLP, WIDTH, key=keys[1])

        def __call__(self, x):
            return x + self.down(jax.nn.gelu(self.up(self.norm(x))))

    blocks = [Mixer(key) for key in jax.random.split(jax.random.key(0), 3)]
    params, static = eqx.partition(blocks, eqx.is_inexact_array)

    def fn(p, x):
        for block in eqx.combine(p, static):
            x = jax.vmap(jax.vmap(block))(x)
        return x

    return Model(loose(fn), params, (INPUT,))


def unet() -> Model:
    """Down to a quarter of the places and up again, each level beside its skip connection."""

    def conv(x, w, stride=1):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=numbers)

    def block(p, x):
        y = conv(jax.nn.silu(rms(x, p["norm"])), p["conv"])
        y = jax.nn.gelu(y @ p["up"]) @ p["down"]
        return (x @ p["skip"] if "skip" in p else x) + y

    @loose
    def fn(params, x):
        x, skips = conv(x, params["in"]), []
        for k, p in enumerate(params["down"]):
            skips.append(x := block(p, x))
            if k < len(params["down"]) - 1:
                x = conv(x, params["narrow"][k], 2)
        x = block(params["middle"], x)
        for k, p in enumerate(params["up"]):
            x = block(p, jnp.concatenate([x, skips.pop()], -1))
            if k < len(params["up"]) - 1:
                x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
        return conv(x, params["out"])

    draw, sizes = Draw(), (8, 16, 32)

    def draw_block(i: int, o: int) -> dict[str, Any]:
        p = {"norm": draw.vector(i, around=1), "conv": draw.matrix(3, 3, i, o, fan_in=9 * i)}
        p |= {"up": draw.matrix(o, 2 * o), "down": draw.matrix(2 * o, o)}
        return p | ({"skip": draw.matrix(i, o)} if i != o else {})

    params = {
        "in": draw.matrix(3, 3, 3, sizes[0], fan_in=27),
        "out": draw.matrix(3, 3, sizes[0], 3, fan_in=9 * sizes[0]),
        "narrow": [draw.matrix(3, 3, i, o, fan_in=9 * i) for i, o in it.pairwise(sizes)],
        "down": [draw_block(n, n) for n in sizes],
        "middle": draw_block(sizes[-1], sizes[-1]),
        "up": [draw_block(64, 16), draw_block(32, 8), draw_block(16, 8)],
    }
    image = np.random.default_rng(2).normal(size=(2, 8, 8, 3)).astype(np.float32)
    return Model(fn, params, (image,))


def encoder_decoder() -> Model:
    """What the encoder gives is normed once, and read by the cross-attention of every layer of the decoder."""
    kv = KV_HEADS * WIDTH // HEADS

    def attention(p, x, y):
        return merged(attend(heads(x @ p["q"]), heads(y @ p["k"]), heads(y @ p["v"]))) @ p["o"]

    @loose
    def fn(params, source, target):
        y = params["embed"][source]
        for p in params["encoder"]:
            n = rms(y, p["norm_1"])
            y = y + attention(p["self"], n, n)
            y = y + gated(p["mlp"], rms(y, p["norm_2"]))
        y = rms(y, params["encoder_norm"])
        x = params["embed"][target]
        for p in params["decoder"]:
            n = rms(x, p["norm_1"])
            x = x + attention(p["self"], n, n)
            x = x + attention(p["cross"], rms(x, p["norm_3"]), y)
            x = x + gated(p["mlp"], rms(x, p["norm_2"]))
        return rms(x, params["norm"]) @ params["head"]

    draw = Draw()
    of_attention = lambda: {n: draw.matrix(WIDTH, kv if n in "kv" else WIDTH) for n in "qkvo"}

    def layer(cross: bool) -> dict[str, Any]:
        p = {f"norm_{k}": draw.vector(WIDTH, around=1) for k in range(1, 4 if cross else 3)}
        p |= {"self": of_attention(), "mlp": gated_params(draw)}
        return p | ({"cross": of_attention()} if cross else {})

    params = {
        "embed": draw.matrix(VOCAB, WIDTH, fan_in=1),
        "encoder": [layer(False) for _ in range(LAYERS)],
        "encoder_norm": draw.vector(WIDTH, around=1),
        "decoder": [layer(True) for _ in range(LAYERS)],
        "norm": draw.vector(WIDTH, around=1),
        "head": draw.matrix(WIDTH, VOCAB),
    }
    return Model(fn, params, (TOKENS, TOKENS[:, ::-1].copy()))


BLOCKS: dict[str, Callable[[], Model]] = {
    f.__name__: ft.cache(f)
    for f in (own_llama, linen_scanned, nnx_blocks, equinox_blocks, unet, encoder_decoder, moe_scanned)
}


DRAW = Draw()
X = DRAW.vector(5, WIDTH)
MATRICES = [DRAW.matrix(WIDTH, WIDTH) for _ in range(4)]
STACK = np.stack(MATRICES)


def mixed(w, x):
    return x + jax.nn.gelu(x @ w)


FAR = {"encoder_decoder": {"decoder/0/cross/k", "decoder/0/cross/v", "decoder/1/cross/k", "decoder/1/cross/v"}}
"""Sites of folds that span too far."""

"""Tiny models in plain JAX, one a way of writing decoders that tracing has to understand.

Each is `fn(params, tokens) -> logits` with params drawn so that all of them matter; `ZOO[name]()` gives a Model.
"""

from __future__ import annotations

import functools as ft
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from loose import loose
from quick import quick_jit

WIDTH, HEADS, KV_HEADS, HEAD, MLP, EXPERTS, VOCAB, LAYERS = 32, 4, 2, 8, 48, 3, 40, 2
TOKENS = np.random.default_rng(7).integers(0, VOCAB, (2, 6), dtype=np.int32)


@dataclass(frozen=True)
class Model:
    fn: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...] = (TOKENS,)


class Draw:
    """Random arrays in the order in which they are asked for."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)

    def matrix(self, *shape: int, fan_in: int | None = None) -> np.ndarray:
        return (self.rng.normal(size=shape) / (fan_in or shape[-2]) ** 0.5).astype(np.float32)

    def vector(self, *shape: int, around: float = 0.0) -> np.ndarray:
        return (around + 0.3 * self.rng.normal(size=shape)).astype(np.float32)


def short(name: str) -> str:
    """A param of the first layer, or of all stacked ones, without its folders: "layers/0/attn/q" is "q"."""
    return re.sub(r"^layers/(0/)?(attn/|mlp/)?|/w$", "", name)


@loose
def rms(x, scale):
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


@loose
def layer_norm(x, scale, bias):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale + bias


@loose
def rope(x):
    """x (b, t, n, d) with the halves of each head turned by position."""
    t, d = x.shape[1], x.shape[-1]
    angles = (jnp.arange(t)[:, None] * 10.0 ** -jnp.arange(d // 2))[:, None]
    left, right = jnp.split(x, 2, -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


@loose
def attend(q, k, v):
    """q (b, t, n, d), k and v (b, t, kv, d), each shared by n / kv heads."""
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))
    scores = jnp.einsum("btnd,bsnd->bnts", q, k) * q.shape[-1] ** -0.5
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(jnp.where(seen, scores, -1e9)), v)


def heads(x):
    return x.reshape(*x.shape[:-1], -1, HEAD)


def merged(x):
    return x.reshape(*x.shape[:-2], -1)


def gqa(p, x):
    q, k, v = heads(x @ p["q"]), heads(x @ p["k"]), heads(x @ p["v"])
    return merged(attend(rope(q), rope(k), v)) @ p["o"]


def gated(p, x):
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def gqa_params(draw: Draw) -> dict[str, Any]:
    kv = KV_HEADS * HEAD
    return {
        "q": draw.matrix(WIDTH, WIDTH),
        "k": draw.matrix(WIDTH, kv),
        "v": draw.matrix(WIDTH, kv),
        "o": draw.matrix(WIDTH, WIDTH),
    }


def gated_params(draw: Draw) -> dict[str, Any]:
    return {"gate": draw.matrix(WIDTH, MLP), "up": draw.matrix(WIDTH, MLP), "down": draw.matrix(MLP, WIDTH)}


def llama_block(p, x):
    x = x + gqa(p["attn"], rms(x, p["attn_norm"]))
    return x + gated(p["mlp"], rms(x, p["mlp_norm"]))


def llama_layer(draw: Draw) -> dict[str, Any]:
    norms = {"attn_norm": draw.vector(WIDTH, around=1), "mlp_norm": draw.vector(WIDTH, around=1)}
    return norms | {"attn": gqa_params(draw), "mlp": gated_params(draw)}


def decoder(
    block: Callable, head: Callable, layer: Callable, draw: Draw, outer: dict[str, Any], layers: int = 1
) -> Model:
    """embed, `block` for each of "layers", `head(params, hidden)`."""

    @loose
    def fn(params, tokens):
        x = params["embed"][tokens]
        for p in params["layers"]:
            x = block(p, x)
        return head(params, x)

    params = {"embed": draw.matrix(VOCAB, WIDTH, fan_in=1), "layers": [layer(draw) for _ in range(layers)]}
    return Model(fn, params | outer)


def scanned(block: Callable, head: Callable, unrolled: Model) -> Model:
    """`unrolled` with its layers stacked: a scan over rematerialized blocks."""

    @loose
    def fn(params, tokens):
        step = jax.checkpoint(lambda x, p: (block(p, x), None))
        return head(params, lax.scan(step, params["embed"][tokens], params["layers"])[0])

    layers = jax.tree.map(lambda *ws: np.stack(ws), *unrolled.params["layers"])
    return Model(fn, unrolled.params | {"layers": layers})


def normed_head(params, x):
    return rms(x, params["norm"]) @ params["head"]


def tied_head(params, x):
    return rms(x, params["norm"]) @ params["embed"].T


def norm_and_head(draw: Draw) -> dict[str, Any]:
    return {"norm": draw.vector(WIDTH, around=1), "head": draw.matrix(WIDTH, VOCAB)}


def llama() -> Model:
    draw = Draw()
    return decoder(llama_block, normed_head, llama_layer, draw, norm_and_head(draw), LAYERS)


def llama_jitted() -> Model:
    draw = Draw()
    return decoder(jax.jit(llama_block), normed_head, llama_layer, draw, norm_and_head(draw))


def llama_scanned() -> Model:
    return scanned(llama_block, normed_head, llama())


def llama_tied() -> Model:
    draw = Draw()
    return decoder(llama_block, tied_head, llama_layer, draw, {"norm": draw.vector(WIDTH, around=1)})


def gemma() -> Model:
    """Norms of 1 + w before and after each branch, norms of q and k, a tied head."""

    def norm(x, w):
        return rms(x, 1.0 + w)

    def attention(p, x):
        q, k, v = heads(x @ p["q"]), heads(x @ p["k"]), heads(x @ p["v"])
        return merged(attend(rope(norm(q, p["q_norm"])), rope(norm(k, p["k_norm"])), v)) @ p["o"]

    def mlp(p, x):
        return (jax.nn.gelu(x @ p["gate"], approximate=True) * (x @ p["up"])) @ p["down"]

    def block(p, x):
        x = x + norm(attention(p["attn"], norm(x, p["pre_attn"])), p["post_attn"])
        return x + norm(mlp(p["mlp"], norm(x, p["pre_mlp"])), p["post_mlp"])

    def layer(draw):
        norms = {name: draw.vector(WIDTH) for name in ("pre_attn", "post_attn", "pre_mlp", "post_mlp")}
        attn = gqa_params(draw) | {"q_norm": draw.vector(HEAD), "k_norm": draw.vector(HEAD)}
        return norms | {"attn": attn, "mlp": gated_params(draw)}

    def head(params, x):
        return norm(x, params["norm"]) @ params["embed"].T

    draw = Draw()
    return decoder(block, head, layer, draw, {"norm": draw.vector(WIDTH)})


def gpt2() -> Model:
    """LayerNorm, q, k and v in one matmul, biases everywhere, gelu, a tied head."""

    def block(p, x):
        y = layer_norm(x, **p["ln_1"])
        q, k, v = (heads(a) for a in jnp.split(y @ p["qkv"]["w"] + p["qkv"]["b"], 3, -1))
        x = x + merged(attend(q, k, v)) @ p["proj"]["w"] + p["proj"]["b"]
        y = jax.nn.gelu(layer_norm(x, **p["ln_2"]) @ p["fc_in"]["w"] + p["fc_in"]["b"])
        return x + y @ p["fc_out"]["w"] + p["fc_out"]["b"]

    def layer(draw):
        linear = lambda i, o: {"w": draw.matrix(i, o), "b": draw.vector(o)}
        return {
            "ln_1": layer_norm_params(draw),
            "qkv": linear(WIDTH, 3 * WIDTH),
            "proj": linear(WIDTH, WIDTH),
            "ln_2": layer_norm_params(draw),
            "fc_in": linear(WIDTH, MLP),
            "fc_out": linear(MLP, WIDTH),
        }

    def head(params, x):
        return layer_norm(x, **params["ln_f"]) @ params["embed"].T

    draw = Draw()
    return decoder(block, head, layer, draw, {"ln_f": layer_norm_params(draw)})


def layer_norm_params(draw: Draw) -> dict[str, Any]:
    return {"scale": draw.vector(WIDTH, around=1), "bias": draw.vector(WIDTH)}


def opt() -> Model:
    """LayerNorm, biases, relu between the two matmuls of the MLP."""

    def block(p, x):
        y = layer_norm(x, **p["ln_1"])
        q, k, v = (heads(y @ p[name]["w"] + p[name]["b"]) for name in "qkv")
        x = x + merged(attend(q, k, v)) @ p["o"]["w"] + p["o"]["b"]
        y = jax.nn.relu(layer_norm(x, **p["ln_2"]) @ p["fc1"]["w"] + p["fc1"]["b"])
        return x + y @ p["fc2"]["w"] + p["fc2"]["b"]

    def layer(draw):
        linear = lambda i, o: {"w": draw.matrix(i, o), "b": draw.vector(o)}
        square = {name: linear(WIDTH, WIDTH) for name in "qkvo"}
        norms = {"ln_1": layer_norm_params(draw), "ln_2": layer_norm_params(draw)}
        return norms | square | {"fc1": linear(WIDTH, MLP), "fc2": linear(MLP, WIDTH)}

    draw = Draw()
    return decoder(block, normed_head, layer, draw, norm_and_head(draw))


def gptj() -> Model:
    """One norm for attention and MLP, which run side by side."""

    def block(p, x):
        y = layer_norm(x, **p["ln"])
        q, k, v = (heads(y @ p[name]) for name in "qkv")
        mlp = jax.nn.gelu(y @ p["fc_in"] + p["fc_in_bias"]) @ p["fc_out"] + p["fc_out_bias"]
        return x + merged(attend(rope(q), rope(k), v)) @ p["o"] + mlp

    def layer(draw):
        mlp = {"fc_in": draw.matrix(WIDTH, MLP), "fc_out": draw.matrix(MLP, WIDTH)}
        biases = {"fc_in_bias": draw.vector(MLP), "fc_out_bias": draw.vector(WIDTH)}
        return {"ln": layer_norm_params(draw)} | {n: draw.matrix(WIDTH, WIDTH) for n in "qkvo"} | mlp | biases

    draw = Draw()
    return decoder(block, normed_head, layer, draw, norm_and_head(draw))


def experts_params(draw: Draw) -> dict[str, Any]:
    return {
        "router": draw.matrix(WIDTH, EXPERTS),
        "gate": draw.matrix(EXPERTS, WIDTH, MLP),
        "up": draw.matrix(EXPERTS, WIDTH, MLP),
        "down": draw.matrix(EXPERTS, MLP, WIDTH),
    }


def experts(p, x):
    """Every expert on every token, weighted by a dense router."""
    flat = x.reshape(-1, WIDTH)
    routed = jnp.broadcast_to(flat, (EXPERTS, *flat.shape))
    hidden = jax.nn.silu(jnp.einsum("eti,eio->eto", routed, p["gate"])) * jnp.einsum("eti,eio->eto", routed, p["up"])
    weights = jax.nn.softmax(flat @ p["router"])
    return jnp.einsum("te,eto->to", weights, jnp.einsum("eti,eio->eto", hidden, p["down"])).reshape(x.shape)


def moe_block(p, x):
    x = x + gqa(p["attn"], rms(x, p["attn_norm"]))
    return x + experts(p["mlp"], rms(x, p["mlp_norm"]))


def moe(layers: int = 1) -> Model:
    def layer(draw):
        return llama_layer(draw) | {"mlp": experts_params(draw)}

    draw = Draw()
    return decoder(moe_block, normed_head, layer, draw, norm_and_head(draw), layers)


def moe_scanned() -> Model:
    return scanned(moe_block, normed_head, moe(LAYERS))


def shared_expert() -> Model:
    """Qwen2-MoE's: beside the experts one for all tokens, with a sigmoid gate that reads the normed tensor too."""

    def block(p, x):
        x = x + gqa(p["attn"], rms(x, p["attn_norm"]))
        y = rms(x, p["mlp_norm"])
        shared = jax.nn.sigmoid(y @ p["shared_gate"]) * gated(p["shared"], y)
        return x + experts(p["mlp"], y) + shared

    def layer(draw):
        more = {"shared": gated_params(draw), "shared_gate": draw.matrix(WIDTH, 1)}
        return llama_layer(draw) | {"mlp": experts_params(draw)} | more

    draw = Draw()
    return decoder(block, normed_head, layer, draw, norm_and_head(draw))


def einsum_attention() -> Model:
    """Projections (h, n, d) and (n, d, h) with biases (n, d), as flax and big_vision store them."""

    def block(p, x):
        y = rms(x, p["attn_norm"])
        q, k, v = (jnp.einsum("bth,hnd->btnd", y, p[n]["w"]) + p[n]["b"] for n in "qkv")
        x = x + jnp.einsum("btnd,ndh->bth", attend(q, k, v), p["o"]["w"]) + p["o"]["b"]
        return x + gated(p["mlp"], rms(x, p["mlp_norm"]))

    def layer(draw):
        projection = lambda: {"w": draw.matrix(WIDTH, HEADS, HEAD, fan_in=WIDTH), "b": draw.vector(HEADS, HEAD)}
        out = {"w": draw.matrix(HEADS, HEAD, WIDTH, fan_in=WIDTH), "b": draw.vector(WIDTH)}
        norms = {"attn_norm": draw.vector(WIDTH, around=1), "mlp_norm": draw.vector(WIDTH, around=1)}
        return norms | {n: projection() for n in "qkv"} | {"o": out, "mlp": gated_params(draw)}

    draw = Draw()
    return decoder(block, normed_head, layer, draw, norm_and_head(draw))


@jax.custom_jvp
def relu_with_own_derivative(x):
    return jnp.maximum(x, 0)


@relu_with_own_derivative.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    return relu_with_own_derivative(x), jnp.where(x > 0, dx, 0)


def custom_activation() -> Model:
    def block(p, x):
        return x + relu_with_own_derivative(rms(x, p["norm"]) @ p["up"]) @ p["down"]

    def layer(draw):
        mlp = gated_params(draw)
        return {"norm": draw.vector(WIDTH, around=1), "up": mlp["up"], "down": mlp["down"]}

    draw = Draw()
    return decoder(block, normed_head, layer, draw, norm_and_head(draw))


def rearranged() -> Model:
    """Weights stored [out, in], in bfloat16, or with heads split, and turned, cast and merged before use."""

    def block(p, x):
        y = rms(x, p["norm"])
        q, k = (heads(y @ p[n].T) for n in "qk")
        v = jnp.einsum("bth,hnd->btnd", y, p["v"].astype(jnp.float32).reshape(WIDTH, HEADS, HEAD))
        return x + lax.dot_general(
            p["o"].reshape(WIDTH, WIDTH), merged(attend(q, k, v)), (((1,), (2,)), ((), ()))
        ).transpose(1, 2, 0)

    def layer(draw):
        return {
            "norm": draw.vector(WIDTH, around=1),
            "q": draw.matrix(WIDTH, WIDTH),
            "k": draw.matrix(WIDTH, WIDTH),
            "v": draw.matrix(WIDTH, WIDTH).astype(jnp.bfloat16),
            "o": draw.matrix(WIDTH, HEADS, HEAD, fan_in=WIDTH),
        }

    def head(params, x):
        return rms(x, params["norm"]) @ params["head"].T

    draw = Draw()
    outer = {"norm": draw.vector(WIDTH, around=1), "head": draw.matrix(VOCAB, WIDTH, fan_in=WIDTH)}
    return decoder(block, head, layer, draw, outer)


ZOO: dict[str, Callable[[], Model]] = {
    f.__name__: ft.cache(f)
    for f in (
        llama,
        llama_jitted,
        llama_scanned,
        llama_tied,
        gemma,
        gpt2,
        opt,
        gptj,
        moe,
        moe_scanned,
        shared_expert,
        einsum_attention,
        custom_activation,
        rearranged,
    )
}


@ft.cache
def compiled(name: str) -> Callable[..., Any]:
    return quick_jit(ZOO[name]().fn)


WAYS = {
    "x @ w": (lambda w, x: x @ w, (6, 4)),
    "x @ w.T": (lambda w, x: x @ w.T, (4, 6)),
    "weight first": (lambda w, x: (w @ x.T).T, (4, 6)),
    "heads out": (lambda w, x: jnp.einsum("ti,ind->tnd", x, w), (6, 2, 5)),
    "heads out, input axis last": (lambda w, x: jnp.einsum("ti,ndi->tnd", x, w), (2, 5, 6)),
    "heads in": (lambda w, x: lax.dot_general(x.reshape(5, 2, 3), w, (((1, 2), (0, 1)), ((), ()))), (2, 3, 4)),
    "features of a head first": (
        lambda w, x: lax.dot_general(x.reshape(5, 3, 2), w, (((1, 2), (1, 0)), ((), ()))),
        (2, 3, 4),
    ),
    "merged first": (lambda w, x: x @ w.reshape(6, 4), (2, 3, 4)),
    "split first": (lambda w, x: jnp.einsum("ti,ind->tnd", x, w.reshape(6, 2, 2)), (6, 4)),
    "cast": (lambda w, x: x @ w.astype(jnp.float32), (6, 4)),
    "under vmap": (lambda w, x: jax.vmap(lambda row: row @ w)(x), (6, 4)),
    "in a jit": (lambda w, x: jax.jit(jnp.dot)(x, w), (6, 4)),
    "a vector": (lambda w, x: x @ w, (6,)),
    "an axis of one": (lambda w, x: x @ w[:, 0], (6, 1, 4)),
}
"""`(w, x) -> y` and w's shape: x (5, 6) times w as the matrix (6, o), in the ways that programs write it."""

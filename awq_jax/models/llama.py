"""Llama decoders (Llama 1 to 3, SmolLM2, TinyLlama, Mistral without a window) in flax.linen, and their HF names.

Params are plain dicts: {"embed": {"embedding"}, "layers_0": {...}, ..., "norm": {"scale"}, "head": {"kernel"}}, no
head where it is tied to the embedding. Each kernel may be a QuantizedTensor. A model runs whole (`Llama`) or as a
stream of pure functions that hold one layer at a time: `embed`, then `block` for each layer, then `head`.
"""

from __future__ import annotations

import dataclasses
import functools as ft
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jaxtyping import Array, Float, Int

from awq_jax.models.fields import flag, mapping, real, whole
from awq_jax.models.linen import QuantizedDense, projections
from awq_jax.weights.tensor import QuantizedTensor, dot, is_quantized

Params = Mapping[str, Any]
Cache = dict[str, dict[str, Float[Array, "b kv length d"]]]
Read = Callable[[str], np.ndarray | QuantizedTensor]

LAYER_NAMES: dict[tuple[str, ...], str] = {
    ("attn_norm", "scale"): "input_layernorm.weight",
    ("attn", "q", "kernel"): "self_attn.q_proj.weight",
    ("attn", "q", "bias"): "self_attn.q_proj.bias",
    ("attn", "k", "kernel"): "self_attn.k_proj.weight",
    ("attn", "k", "bias"): "self_attn.k_proj.bias",
    ("attn", "v", "kernel"): "self_attn.v_proj.weight",
    ("attn", "v", "bias"): "self_attn.v_proj.bias",
    ("attn", "o", "kernel"): "self_attn.o_proj.weight",
    ("attn", "o", "bias"): "self_attn.o_proj.bias",
    ("mlp_norm", "scale"): "post_attention_layernorm.weight",
    ("mlp", "gate", "kernel"): "mlp.gate_proj.weight",
    ("mlp", "gate", "bias"): "mlp.gate_proj.bias",
    ("mlp", "up", "kernel"): "mlp.up_proj.weight",
    ("mlp", "up", "bias"): "mlp.up_proj.bias",
    ("mlp", "down", "kernel"): "mlp.down_proj.weight",
    ("mlp", "down", "bias"): "mlp.down_proj.bias",
}
"""Path in a layer's params -> Hugging Face name after `model.layers.{i}.`"""

OUTER_NAMES: dict[tuple[str, ...], str] = {
    ("embed", "embedding"): "model.embed_tokens.weight",
    ("norm", "scale"): "model.norm.weight",
    ("head", "kernel"): "lm_head.weight",
}
"""Path in the params outside of the layers -> Hugging Face name."""

FUSED: dict[str, tuple[tuple[str, ...], ...]] = {
    "self_attn.qkv_proj": (("attn", "q", "kernel"), ("attn", "k", "kernel"), ("attn", "v", "kernel")),
    "mlp.gate_up_proj": (("mlp", "gate", "kernel"), ("mlp", "up", "kernel")),
}
"""What servers call the one matrix that they make of several -> the paths of these in a layer's params."""

IGNORED = r"rotary_emb\.inv_freq$"
"""Names of tensors that are computed anew instead of read; old checkpoints hold them."""


@dataclass(frozen=True)
class Rope:
    """Rotary angles: position * theta ** (-2j / head_dim), the frequencies scaled as `kind` says.

    kind is "default", "linear" (all divided by factor) or "llama3" (those that turn fewer than `low` times in
    `original_length` positions divided by factor, those that turn more than `high` times kept, blended between).
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Rope:
        """Of a config.json: rope_theta and rope_scaling (transformers 4) or rope_parameters (5)."""
        older, newer = mapping(hf, "rope_scaling"), mapping(hf, "rope_parameters")
        if nested := [key for rope in (older, newer) for key, value in rope.items() if isinstance(value, Mapping)]:
            raise ValueError(f"rope parameters for {nested}: this model has one rope for all layers.")
        found = older or newer
        kind = found.get("rope_type") or found.get("type") or "default"
        if kind not in ("default", "linear", "llama3"):
            raise ValueError(f"rope type {kind!r}: this model knows 'default', 'linear' and 'llama3'.")
        rotated = found.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
        if rotated not in (None, 1, 1.0):
            raise ValueError(f"partial_rotary_factor={rotated}: this model rotates whole heads only.")
        holds_theta = (rope for rope in (found, hf, newer) if rope.get("rope_theta") is not None)
        theta = real(next(holds_theta, {}), "rope_theta", cls.theta)
        if kind == "default":
            return cls(theta=theta)
        where = f"the {kind} rope parameters"
        factor = real(found, "factor", where=where)
        if kind == "linear":
            return cls(kind, theta, factor)
        low, high = (real(found, f"{end}_freq_factor", where=where) for end in ("low", "high"))
        if low >= high:
            raise ValueError(f"{where} have low_freq_factor={low} and high_freq_factor={high}: expected low < high.")
        original = whole(found, "original_max_position_embeddings", None, where)
        return cls(kind, theta, factor, low, high, original or whole(hf, "max_position_embeddings"))

    def frequencies(self, head_dim: int) -> Float[np.ndarray, " half"]:
        """Radians a position, computed in float32 as transformers does."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        base = 1 / np.float32(self.theta) ** exponents
        if self.kind == "default":
            return base
        if self.kind == "linear":
            return base / np.float32(self.factor)
        turns = self.original_length * base / np.float32(2 * np.pi)
        kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1).astype(np.float32)
        return kept * base + (1 - kept) * base / np.float32(self.factor)


@dataclass(frozen=True)
class Config:
    """Sizes and options of a Llama; `dtype` is what the embeddings are cast to and so what all is computed in.

    `positions` are those that it was trained for, None where that is not known.

    Raises:
      ValueError: sizes that do not fit together.
    """

    vocab: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: Rope = field(default_factory=Rope)
    dtype: Any = jnp.float32
    positions: int | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not divide by {self.kv_heads} key-value heads.")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rotary positions need an even one.")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], dtype: Any = jnp.float32) -> Config:
        """The Config of a config.json of transformers 4 or 5, with transformers' defaults for what it leaves out.

        Raises:
          ValueError: a field is missing, of another type or out of range, or hidden_act or the rope type is not one
            that this model computes.
        """
        if (act := hf.get("hidden_act")) not in (None, "silu"):
            raise ValueError(f"hidden_act={act!r}: this model computes 'silu' only.")
        width, heads = whole(hf, "hidden_size"), whole(hf, "num_attention_heads")
        head_dim = whole(hf, "head_dim", None)
        if head_dim is None and width % heads:
            raise ValueError(f"hidden_size={width} does not divide by num_attention_heads={heads}.")
        rope, positions = Rope.from_hf(hf), whole(hf, "max_position_embeddings", None)
        return cls(
            vocab=whole(hf, "vocab_size"),
            width=width,
            mlp_width=whole(hf, "intermediate_size"),
            layers=whole(hf, "num_hidden_layers"),
            heads=heads,
            kv_heads=whole(hf, "num_key_value_heads", None) or heads,
            head_dim=head_dim or width // heads,
            norm_eps=real(hf, "rms_norm_eps", cls.norm_eps),
            tied=flag(hf, "tie_word_embeddings", cls.tied),
            attention_bias=flag(hf, "attention_bias", cls.attention_bias),
            mlp_bias=flag(hf, "mlp_bias", cls.mlp_bias),
            rope=rope,
            dtype=dtype,
            # Configs give the length before linear scaling; as vLLM counts.
            positions=int(positions * rope.factor) if positions and rope.kind == "linear" else positions,
        )


SUPPORTED = "LlamaForCausalLM, and MistralForCausalLM with sliding_window null"


def accepts(hf: Mapping[str, Any], architecture: str) -> bool:
    """Whether a checkpoint of this architecture is computed here; a Mistral is a Llama where it has no window.

    transformers gives a Mistral whose config names no window one of 4096.
    """
    no_window = "sliding_window" in hf and hf["sliding_window"] is None
    return architecture == "LlamaForCausalLM" or (architecture == "MistralForCausalLM" and no_window)


class RMSNorm(nn.Module):
    """`x / rms(x) * scale` over the last axis, in float32; x's dtype comes back."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*b h"]) -> Float[Array, "*b h"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        normed = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return (normed * jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))).astype(x.dtype)


class Embed(nn.Module):
    config: Config

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), (c.vocab, c.width))

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t h"]:
        return jnp.take(self.embedding, tokens, axis=0).astype(self.config.dtype)

    def attend(self, hidden: Float[Array, "*b h"]) -> Float[Array, "*b v"]:
        """Logits of a tied head."""
        return dot(hidden, self.embedding.astype(hidden.dtype).T)


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h"], cache: Any = None, position: Int[Array, ""] | None = None
    ) -> tuple[Float[Array, "b t h"], Any]:
        c = self.config
        b, t, _ = x.shape
        widths = {"q": c.heads * c.head_dim, "k": c.kv_heads * c.head_dim, "v": c.kv_heads * c.head_dim}
        q, k, v = (y.reshape(b, t, c.kv_heads, -1, c.head_dim) for y in projections(x, widths, c.attention_bias))
        k, v = k.squeeze(3), v.squeeze(3)
        angles = _angles(c, t, position)
        q = rotate(q.transpose(0, 2, 3, 1, 4), angles)
        k = rotate(k.transpose(0, 2, 1, 3), angles)
        v = v.transpose(0, 2, 1, 3)
        if cache is not None:
            start = (0, 0, 0 if position is None else position, 0)
            cache = {
                "k": lax.dynamic_update_slice(cache["k"], k.astype(cache["k"].dtype), start),
                "v": lax.dynamic_update_slice(cache["v"], v.astype(cache["v"].dtype), start),
            }
        if cache is None or position is None:
            y = causal_attention(q, k, v)
        else:
            y = attend(q, cache["k"].astype(q.dtype), cache["v"].astype(q.dtype), position)
        y = y.transpose(0, 3, 1, 2, 4).reshape(b, t, c.heads * c.head_dim)
        return QuantizedDense(c.width, c.attention_bias, name="o")(y), cache


class MLP(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "b t h"]) -> Float[Array, "b t h"]:
        c = self.config
        gate, up = projections(x, {"gate": c.mlp_width, "up": c.mlp_width}, c.mlp_bias)
        return QuantizedDense(c.width, c.mlp_bias, name="down")(nn.silu(gate) * up)


class Block(nn.Module):
    config: Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h"], cache: Any = None, position: Int[Array, ""] | None = None
    ) -> tuple[Float[Array, "b t h"], Any]:
        c = self.config
        y, cache = Attention(c, name="attn")(RMSNorm(c.norm_eps, name="attn_norm")(x), cache, position)
        x = x + y
        return x + MLP(c, name="mlp")(RMSNorm(c.norm_eps, name="mlp_norm")(x)), cache


class Llama(nn.Module):
    """The whole decoder.

    Example:
      >>> logits = Llama(config).apply({"params": params}, tokens)
      >>> logits, cache = Llama(config).apply({"params": params}, prompt, cache=init_cache(config, 1, 256))
      >>> logits, cache = Llama(config).apply({"params": params}, token, cache=cache, position=prompt.shape[1])
    """

    config: Config

    def setup(self) -> None:
        c = self.config
        self.embed = Embed(c)
        self.layers = [Block(c) for _ in range(c.layers)]
        self.norm = RMSNorm(c.norm_eps)
        if not c.tied:
            self.head = QuantizedDense(c.vocab)

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
        x, new = self.embed(tokens), {}
        for i, layer in enumerate(self.layers):
            x, new[_layer(i)] = layer(x, None if cache is None else cache[_layer(i)], position)
        return x, new

    def logits(self, hidden: Float[Array, "*b h"]) -> Float[Array, "*b v"]:
        """Final norm and head, float32."""
        x = self.norm(hidden)
        return (self.embed.attend(x) if self.config.tied else self.head(x)).astype(jnp.float32)


def embed(config: Config, params: Params, tokens: Int[Array, "b t"]) -> Float[Array, "b t h"]:
    """What enters layer 0; `params` needs "embed" only."""
    return _apply(Embed(config), params["embed"], tokens)


def block(config: Config, layer_params: Params, hidden: Float[Array, "b t h"]) -> Float[Array, "b t h"]:
    """One layer on positions 0 .. t-1; jit it with `config` static and every layer runs the same program."""
    return _apply(Block(config), layer_params, hidden)[0]


def head(config: Config, params: Params, hidden: Float[Array, "*b h"]) -> Float[Array, "*b v"]:
    """Logits of what the last layer gave, float32; `params` needs "norm" and "head", or "embed" when tied."""
    return _apply(Llama(config), params, hidden, method="logits")


def hidden(config: Config, params: Params, tokens: Int[Array, "b t"]) -> Float[Array, "b t h"]:
    """What the last layer gives, before the final norm; needs neither that nor a head."""
    return _apply(Llama(config), params, tokens, method="hidden")[0]


def init_cache(config: Config, batch: int, length: int, dtype: Any = None) -> Cache:
    """An empty cache for `length` positions, {"layers_0": {"k", "v"}, ...}, in `dtype` or else the config's."""
    shape = (batch, config.kv_heads, length, config.head_dim)
    zeros = lambda: jnp.zeros(shape, config.dtype if dtype is None else dtype)
    return {_layer(i): {"k": zeros(), "v": zeros()} for i in range(config.layers)}


def rotate(x: Float[Array, "*b t d"], angles: Float[Array, "t half"]) -> Float[Array, "*b t d"]:
    """Each pair (x[j], x[j + d/2]) turned by its angle, in float32 (RoFormer, arXiv 2104.09864)."""
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    angles = jnp.expand_dims(angles, range(x.ndim - 2))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x.dtype)


def causal_attention(
    q: Float[Array, "b kv g t d"], k: Float[Array, "b kv t d"], v: Float[Array, "b kv t d"]
) -> Float[Array, "b kv g t d"]:
    """Row i attends to keys 0 .. i; g query heads share a key-value head.

    In up to 8 slices of rows, each against the keys that it can see: fewer products, and scores that stay in cache.
    """
    t = q.shape[3]
    rows = max(128, -(-t // 8))
    slices = [attend(q[:, :, :, i : i + rows], k[:, :, : i + rows], v[:, :, : i + rows], i) for i in range(0, t, rows)]
    return slices[0] if len(slices) == 1 else jnp.concatenate(slices, axis=3)


def attend(
    q: Float[Array, "b kv g t d"], k: Float[Array, "b kv s d"], v: Float[Array, "b kv s d"], position: Any
) -> Float[Array, "b kv g t d"]:
    """`softmax(q k' / sqrt(d)) v`, scores and softmax in float32; row i attends to keys 0 .. position + i."""
    products = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32)
    seen = position + jnp.arange(q.shape[3])[:, None] >= jnp.arange(k.shape[2])[None]
    scores = jnp.where(seen[None, None, None], products * q.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
    mixed = jnp.einsum("bkgts,bksd->bkgtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (mixed / weights.sum(-1, keepdims=True)).astype(q.dtype)


def load(read: Read, config: Config) -> dict[str, Any]:
    """All params of a checkpoint.

    Args:
      read: the tensor of a Hugging Face name: an array in HF orientation ([out, in] for matrices), or a
        QuantizedTensor, already [in, out].

    Raises:
      ValueError: a tensor's shape is not what the config asks for.
    """
    return unflatten_dict({name: param(read, config, name) for name in param_shapes(config)}, sep="/")


def param(read: Read, config: Config, name: str) -> Any:
    """The param of a path, "layers_0/attn/q/kernel"; see `load`."""
    stored, shape = _stored(config)[name]
    is_matrix, value = name.endswith("/kernel"), read(stored)
    if is_quantized(value) and not is_matrix:
        raise ValueError(f"{stored} is quantized: only matrices of linear layers may be. Dequantize it.")
    value = value.T if is_matrix and not is_quantized(value) else value
    if value.shape != shape:
        raise ValueError(
            f"{stored}: found shape {value.shape} (as [in, out] if a matrix), the config asks for "
            f"{shape}. Is config.json that of these weights?"
        )
    return value


def to_names(params: Params) -> dict[str, Any]:
    """Params, all or some, by Hugging Face name; dense matrices as [out, in], others as they are."""
    flat = flatten_dict(dict(params), is_leaf=lambda _, v: is_quantized(v))
    turn = lambda path, w: w.T if path[-1] == "kernel" and not is_quantized(w) else w
    return {_name(path): turn(path, w) for path, w in flat.items()}


def param_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shape of every param by its path, "layers_0/attn/q/kernel"."""
    return {"/".join(path): shape for path, _, shape in _shapes_of_all(config)}


def stored_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that `load` reads, by Hugging Face name; of matrices [out, in]."""
    return {name: shape[::-1] if path[-1] == "kernel" else shape for path, name, shape in _shapes_of_all(config)}


def matrix_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """[in, out] of every matrix in a layer by its path, "layers_0/attn/q/kernel"."""
    shapes = {"/".join(path): shape for path, shape in _layer_shapes(config).items() if path[-1] == "kernel"}
    return {f"{_layer(i)}/{path}": shape for i in range(config.layers) for path, shape in shapes.items()}


def fused(config: Config) -> dict[str, tuple[str, ...]]:
    """The Hugging Face name of every matrix that servers make of several -> the paths of these."""
    return {
        f"model.layers.{i}.{name}": tuple("/".join((_layer(i), *path)) for path in paths)
        for i in range(config.layers)
        for name, paths in FUSED.items()
    }


def _shapes_of_all(config: Config) -> Iterator[tuple[tuple[str, ...], str, tuple[int, ...]]]:
    """Path, Hugging Face name and shape of every param."""
    layer = _layer_shapes(config).items()
    layers = (((_layer(i), *path), shape) for i in range(config.layers) for path, shape in layer)
    for path, shape in (*_outer_shapes(config).items(), *layers):
        yield path, _name(path), shape


def _name(path: tuple[str, ...]) -> str:
    """The Hugging Face name of a param."""
    outer, number = path[0].partition("layers_")[::2]
    return OUTER_NAMES[path] if outer else f"model.layers.{number}.{LAYER_NAMES[path[1:]]}"


@ft.cache
def _stored(config: Config) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Hugging Face name and shape of every param by its path."""
    return {"/".join(path): (name, shape) for path, name, shape in _shapes_of_all(config)}


@ft.cache
def _layer_shapes(config: Config) -> dict[tuple[str, ...], tuple[int, ...]]:
    hidden = jax.ShapeDtypeStruct((1, 1, config.width), config.dtype)
    return _shapes(Block(config), hidden)


@ft.cache
def _outer_shapes(config: Config) -> dict[tuple[str, ...], tuple[int, ...]]:
    outer = Llama(dataclasses.replace(config, layers=0))
    return _shapes(outer, jax.ShapeDtypeStruct((1, 1), jnp.int32))


def _shapes(module: nn.Module, x: jax.ShapeDtypeStruct) -> dict[tuple[str, ...], tuple[int, ...]]:
    flat: dict[Any, Any] = flatten_dict(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    return {path: leaf.shape for path, leaf in flat.items()}


def _apply(module: nn.Module, params: Params, *args: Any, **rest: Any) -> Any:
    return module.apply({"params": params}, *args, **rest)


def _angles(config: Config, t: int, position: Any) -> Float[Array, "t half"]:
    positions = jnp.arange(t) + (0 if position is None else position)
    return positions[:, None].astype(jnp.float32) * config.rope.frequencies(config.head_dim)[None]


def _layer(i: int) -> str:
    return f"layers_{i}"

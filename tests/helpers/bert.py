"""BERT in plain JAX on Hugging Face's own weight names, as the sentence encoder all-MiniLM-L6-v2 runs it."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors.numpy import load_file
from tokenizers import Tokenizer

HEADS, LAYERS, EPS = 12, 6, 1e-12
Params = dict[str, Array]


def load(folder: Path) -> Params:
    weights = load_file(folder / "model.safetensors")
    return {name: jnp.asarray(w) for name, w in weights.items() if w.dtype == np.float32}


def linear(params: Params, name: str, x: Array) -> Array:
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def layer_norm(params: Params, name: str, x: Array) -> Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + EPS)
    return x * params[f"{name}.weight"] + params[f"{name}.bias"]


def attention(params: Params, name: str, x: Array, mask: Array) -> Array:
    q, k, v = (
        linear(params, f"{name}.self.{part}", x).reshape(*x.shape[:2], HEADS, -1) for part in ("query", "key", "value")
    )
    mixed = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :] > 0)
    return linear(params, f"{name}.output.dense", mixed.reshape(x.shape))


def hidden(params: Params, ids: Int[Array, "b t"], mask: Int[Array, "b t"]) -> Float[Array, "b t i"]:
    """The last layer's states; `mask` is 0 where `ids` are padding."""
    x = params["embeddings.word_embeddings.weight"][ids]
    x = x + params["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = layer_norm(params, "embeddings.LayerNorm", x + params["embeddings.token_type_embeddings.weight"][0])
    for k in range(LAYERS):
        name = f"encoder.layer.{k}"
        x = layer_norm(
            params, f"{name}.attention.output.LayerNorm", x + attention(params, f"{name}.attention", x, mask)
        )
        up = jax.nn.gelu(linear(params, f"{name}.intermediate.dense", x), approximate=False)
        x = layer_norm(params, f"{name}.output.LayerNorm", x + linear(params, f"{name}.output.dense", up))
    return x


def embed(params: Params, ids: Int[Array, "b t"], mask: Int[Array, "b t"]) -> Float[Array, "b i"]:
    """A sentence's embedding: the mean of its tokens' states, of length 1."""
    weights = mask[..., None].astype(jnp.float32)
    mean = (hidden(params, ids, mask) * weights).sum(1) / weights.sum(1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def tokenized(folder: Path, texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of `texts`, cut or padded to `length` tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(texts)
    return np.array([e.ids for e in encoded], np.int32), np.array([e.attention_mask for e in encoded], np.int32)

"""Tiny Llamas with random params: config.json dicts that cover what real ones ask for."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.models import for_config
from awq_jax.models.decoder import Decoder
from awq_jax.models.families.llama import LLAMA
from awq_jax.models.layer import Config

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CHANGES: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "as many key-value heads": {"num_key_value_heads": 4},
    "one key-value head": {"num_key_value_heads": 1},
    "tied head": {"tie_word_embeddings": True},
    "llama3 rope, v4 style": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "llama3 rope, v5 style": {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}, "rope_theta": None},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "rope theta, v5 style": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": None},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "explicit head_dim": {"head_dim": 32},
    "odd sizes": {"hidden_size": 60, "intermediate_size": 100, "num_attention_heads": 3, "num_key_value_heads": 1},
}


def hf_config(case: str = "grouped heads", **changes: Any) -> dict[str, Any]:
    """A config.json, of its own throughout: transformers writes into what it is given. None drops a key."""
    return deepcopy({k: v for k, v in (BASE | CHANGES[case] | changes).items() if v is not None})


def config_of(hf: dict[str, Any], dtype: Any = jnp.float32) -> Config:
    family = for_config(hf) if hf.get("architectures") else LLAMA
    return family.config(hf, dtype)


def random_params(config: Config, seed: int = 0) -> dict[str, Any]:
    """Params drawn so that attention and biases matter, unlike those of an initialiser."""
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        offset = 1.0 if path[-1].key == "scale" else 0.0
        spread = 2 * leaf.shape[0] ** -0.5 if path[-1].key == "kernel" else 0.2
        return jnp.asarray(offset + spread * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_tokens(config: Config, batch: int = 2, length: int = 12, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab, (batch, length), dtype=np.int32)

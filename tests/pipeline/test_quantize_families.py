"""Families that differ most from Llama: from their folder to a quantized one and back."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import tiny_folder
from quick import quick_compilation
from tiny import random_tokens

import awq_jax as awq
from awq_jax.errors import InputError
from awq_jax.formats.safetensors import open_shards
from awq_jax.search import Grid, no_clip, to_nearest
from awq_jax.weights.paths import named_leaves
from awq_jax.weights.tensor import is_quantized

QUICK = awq.Recipe(group_size=32, scale=Grid(), clip=no_clip, rounding=to_nearest, gram_block=32)
LATENT = {
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "n_group": 2,
    "topk_group": 1,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LLAMAS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "tie_word_embeddings": None}
GPT2 |= dict.fromkeys((*LLAMAS, "max_position_embeddings", "rms_norm_eps"))
CASES = {
    "qwen3_moe": ("awq", {"num_experts": 4, "norm_topk_prob": True} | EXPERTS),
    "deepseek_v3": ("awq", LATENT | EXPERTS),
    "phi3": ("awq", {}),
    "gemma2": ("awq", {"head_dim": 16, "sliding_window": 8}),
    "gpt2": ("orbax", GPT2),
}
"""By model_type: the format it is written in, and what its config.json says beside Llama's."""
ARCHITECTURES = {
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compilation():
        yield


@pytest.mark.parametrize("kind", CASES)
def test_a_folder_of_a_family_is_quantized_and_read_back(tmp_path, kind):
    format, changes = CASES[kind]
    names = {"model_type": kind, "architectures": [ARCHITECTURES[kind]], "hidden_act": None}
    dense = tiny_folder(tmp_path / "in", **names | changes)
    made = awq.quantize_checkpoint(dense, tmp_path / "out", QUICK, format=format, samples=2, seq_len=64)
    big, small = awq.load(dense), awq.load(tmp_path / "out")
    leaves = {name: w for name, w in named_leaves(small.params).items() if is_quantized(w)}
    assert leaves.keys() == {site.name for site in made.sites if site.spec is not None}
    assert not any("router" in name for name in leaves)
    wide = lambda w: replace(w, dtype=jnp.float32).dequantize() if is_quantized(w) else w
    whole = replace(small, params=jax.tree.map(wide, small.params, is_leaf=is_quantized))
    tokens = random_tokens(big.config, batch=2, length=24)
    found, exact, expected = (np.asarray(m.logits(tokens)) for m in (small, whole, big))
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-4 * np.abs(exact).max())
    error = np.square(found - expected).mean() / np.square(expected).mean()
    assert 0 < error < 0.5
    text = small.generate("Words", max_new_tokens=3, chat=False)
    assert isinstance(text, str)
    if kind == "gpt2":
        with pytest.raises(InputError, match="stored the other way round"):
            awq.convert(tmp_path / "out", tmp_path / "no", "mlx", requantize=True)
        assert not (tmp_path / "no").exists()


def test_experts_are_written_under_their_own_names(tmp_path):
    _, changes = CASES["qwen3_moe"]
    names = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    dense = tiny_folder(tmp_path / "in", **names | changes)
    awq.quantize_checkpoint(dense, tmp_path / "out", QUICK, samples=2, seq_len=64)
    stored = open_shards(tmp_path / "out")
    for e in range(4):
        for part, (i, o) in {"gate": (64, 32), "down": (32, 64)}.items():
            tensor = stored[f"model.layers.1.mlp.experts.{e}.{part}_proj.qweight"]
            assert math.prod(tensor.shape) == i * o // 8
    assert "model.layers.1.mlp.gate.weight" in stored


def test_autoawq_has_no_conv1d(tmp_path):
    _, changes = CASES["gpt2"]
    names = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "hidden_act": None}
    dense = tiny_folder(tmp_path / "in", **names | changes)
    with pytest.raises(InputError, match="GPT2LMHeadModel are stored the other way round"):
        awq.quantize_checkpoint(dense, tmp_path / "out")

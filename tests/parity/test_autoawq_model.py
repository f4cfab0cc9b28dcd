"""A folder that we write, unpacked by hand in torch and run by transformers' own Llama."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import tiny_folder
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import awq_jax as awq
from awq_jax.commands.demo import evaluation_text

NEAREST = replace(awq.PRESETS["llm_awq"], group_size=32, clip=awq.PRESETS["rtn"].clip)
SHIFTS = {column: 4 * nibble for column, nibble in enumerate([0, 4, 1, 5, 2, 6, 3, 7])}
"""Bits by which column k of each eight is shifted in its word."""


def unpacked(words):
    """int32 [r, c] -> [r, 8 c] codes."""
    nibbles = [(words.long() >> SHIFTS[k]) & 15 for k in range(8)]
    return torch.stack(nibbles, -1).reshape(words.shape[0], -1)


def dense_state(folder: Path):
    """The folder's tensors by the names and in the orientation of transformers' dense model, float32."""
    stored = load_file(folder / "model.safetensors")
    state = {name: w.float() for name, w in stored.items() if name.endswith(".weight")}
    for name in [n for n in stored if n.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        q, z, s = (unpacked(stored[name]), unpacked(stored[f"{module}.qzeros"]), stored[f"{module}.scales"].float())
        rows = torch.arange(q.shape[0]) // (q.shape[0] // s.shape[0])
        state[f"{module}.weight"] = ((q - z[rows]) * s[rows]).T.contiguous()
    return state


def in_transformers(folder: Path):
    """transformers' Llama with the folder's weights."""
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "awq"
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if "dtype" not in k})).float().eval()
    missing, unexpected = model.load_state_dict(dense_state(folder), strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if config["tie_word_embeddings"] else [])
    model.generation_config.eos_token_id = None
    return model


def compare(folder: Path, length: int, new_tokens: int):
    ours, theirs = awq.load(folder), in_transformers(folder)
    ids = AutoTokenizer.from_pretrained(folder)(evaluation_text()[: 8 * length]).input_ids[:length]
    tokens = np.array([ids], np.int32)
    assert tokens.shape == (1, length)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    found = np.asarray(ours.logits(tokens))
    assert expected.std() > 0.5
    assert np.abs(found - expected).max() <= 1e-3
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))
    with torch.no_grad():
        continued = theirs.generate(
            torch.from_numpy(tokens[:, :20]).long(), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )
    written = awq.models.generate.generate(ours.config, ours.params, tokens[:, :20], max_new_tokens=new_tokens)
    np.testing.assert_array_equal(np.asarray(written), continued.numpy())


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_computes_the_same(tmp_path, tied):
    model = tiny_folder(tmp_path / "dense", tie_word_embeddings=tied)
    awq.quantize_checkpoint(model, tmp_path / "awq", NEAREST, samples=4, seq_len=128)
    compare(tmp_path / "awq", length=96, new_tokens=16)


@pytest.mark.model
def test_transformers_computes_the_same_smollm2(smollm2, tmp_path):
    recipe = replace(awq.PRESETS["rtn"], group_size=64)
    awq.quantize_checkpoint(smollm2, tmp_path / "awq", recipe, samples=1, seq_len=64)
    compare(tmp_path / "awq", length=64, new_tokens=8)

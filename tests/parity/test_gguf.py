"""GGUF files against what transformers loads from them."""

import numpy as np
import pytest
import torch
from folders import llama_weights, write_gguf
from gguf import GGMLQuantizationType as T
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from vocabularies import TEXT, byte_level, sentencepiece

from awq_jax.formats.checkpoint import open_checkpoint

TOKENS = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [f"t{i}" for i in range(64)]}


def both(folder, kind, tied, **changes):
    """(our checkpoint, transformers' config and tensors) of the same file."""
    write_gguf(folder / "m.gguf", llama_weights(tied), kind, changes=TOKENS | changes)
    ours = open_checkpoint(folder / "m.gguf")
    config = load_gguf_checkpoint(folder / "m.gguf")["config"]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    tensors = load_gguf_checkpoint(folder / "m.gguf", return_tensors=True, model_to_load=model)["tensors"]
    return ours, config, tensors


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [T.F32, T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K])
def test_every_parameter_is_the_same_to_the_bit(tmp_path, kind, tied):
    ours, _, theirs = both(tmp_path, kind, tied)
    assert ours.names == set(theirs)
    for name, expected in theirs.items():
        np.testing.assert_array_equal(ours.read(name), expected.float().numpy(), err_msg=name)


def test_the_config_says_the_same(tmp_path):
    ours, theirs, _ = both(tmp_path, T.F32, True, **{"llama.rope.freq_base": 5e5})
    assert theirs["rope_theta"] == ours.config["rope_theta"] == 5e5
    for key in (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "tie_word_embeddings",
    ):
        assert ours.config[key] == theirs[key], key
    assert ours.config["rms_norm_eps"] == pytest.approx(theirs["rms_norm_eps"], rel=1e-7)


def assert_same_ids(ours, theirs, texts):
    for text in texts:
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)


@pytest.mark.parametrize(
    "metadata",
    [
        byte_level("gpt-2"),
        byte_level("qwen2"),
        byte_level("llama-bpe", **{"tokenizer.ggml.add_bos_token": True}),
        sentencepiece(),
        sentencepiece(**{"tokenizer.ggml.add_eos_token": True}),
    ],
)
def test_tokenizers_give_the_same_ids(tmp_path, metadata):
    write_gguf(tmp_path / "m.gguf", llama_weights(), changes=metadata)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = open_checkpoint(tmp_path / "m.gguf").tokenizer()
    assert_same_ids(ours, theirs, [TEXT, "hello hello", "a  12", "", "\n\n"])
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == (theirs.bos_token, theirs.eos_token, theirs.pad_token)
    assert ours.chat_template == theirs.chat_template


@pytest.mark.model
def test_tokenizers_of_smollm2_give_the_same_ids(smollm2):
    """On text without blanks in front of digits: transformers does not split digits as SmolLM2's own tokenizer does."""
    theirs = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    ours = open_checkpoint(smollm2).tokenizer()
    assert_same_ids(ours, theirs, [TEXT.replace("  12", " 12"), "In 1492, 3.5 % of 10 km²; it's <|im_end|>\n\tok"])
    turns = [{"role": "user", "content": "Why is the sky blue?"}]
    ask = {"tokenize": False, "add_generation_prompt": True}
    assert ours.apply_chat_template(turns, **ask) == theirs.apply_chat_template(turns, **ask)

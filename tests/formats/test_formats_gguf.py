"""GGUF files of Llamas: tensors, config, and what is said of files that cannot be read."""

import contextlib
import functools as ft

import gguf
import numpy as np
import pytest
from folders import HEAD_DIM, HIDDEN, KV_HEADS, VOCAB, halves_interleaved, llama_weights, write_gguf
from gguf import GGMLQuantizationType as T
from hypothesis import given
from hypothesis import strategies as st

from awq_jax.errors import InputError
from awq_jax.formats.checkpoint import open_checkpoint
from awq_jax.formats.gguf.file import halves_joined, llama3_factors, open_gguf
from awq_jax.formats.gguf.header import read_header

TYPES = [T.F32, T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_tensors_of_every_type(tmp_path, kind):
    file = tmp_path / "m.gguf"
    weights = llama_weights(tied=False)
    expected = write_gguf(file, weights, kind)
    checkpoint = open_checkpoint(file)
    assert (checkpoint.kind, len(checkpoint.names)) == ("gguf", len(weights))
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
        "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
        "model.layers.1.post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
        "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
        "model.layers.1.self_attn.k_proj.weight": "blk.1.attn_k.weight",
        "model.layers.1.self_attn.v_proj.weight": "blk.1.attn_v.weight",
        "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
        "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
        "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
    }.items():
        found = checkpoint.read(ours)
        assert found.dtype == np.float32
        assert found.shape == checkpoint.shape(ours) == weights[theirs].shape
        np.testing.assert_array_equal(found, expected[theirs])
        if kind == T.F32:
            np.testing.assert_array_equal(found, weights[theirs])


def test_a_q8_0_block_is_its_step_times_its_bytes(tmp_path):
    block = np.concatenate([np.array([0.5], "<f2").view(np.uint8), np.arange(-16, 16).astype(np.int8).view(np.uint8)])
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("t", block[None], raw_dtype=T.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    entry = read_header(tmp_path / "m.gguf").entries["t"]
    raw = np.fromfile(tmp_path / "m.gguf", np.uint8)[entry.offset : entry.offset + entry.nbytes]
    np.testing.assert_array_equal(raw, block)
    assert entry.shape == (1, 32)


@given(heads=st.integers(1, 4), half=st.integers(1, 4), columns=st.sampled_from([(), (3,)]))
def test_halves_of_heads_are_put_back(heads, half, columns):
    w = np.arange(heads * half * 2 * int(np.prod(columns))).reshape(heads * half * 2, *columns)
    np.testing.assert_array_equal(halves_joined(halves_interleaved(w, heads), heads), w)


def test_the_header_is_what_the_gguf_package_reads(tmp_path):
    changes = {"tokenizer.ggml.tokens": ["a", "日本", ""], "numbers": [1, -2], "llama.flag": True}
    write_gguf(tmp_path / "m.gguf", llama_weights(), T.Q4_1, changes=changes)
    theirs = gguf.GGUFReader(tmp_path / "m.gguf")
    ours = read_header(tmp_path / "m.gguf")
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == fields
    assert {name: (e.shape, e.type, e.offset, e.nbytes) for name, e in ours.entries.items()} == {
        t.name: (tuple(t.shape.tolist())[::-1], t.tensor_type, t.data_offset, t.n_bytes) for t in theirs.tensors
    }


def config_of(folder, tied=True, more_tensors=None, **changes):
    keys = {k.replace("__", "."): v for k, v in changes.items()}
    write_gguf(folder / "m.gguf", llama_weights(tied), changes=keys, more_tensors=more_tensors)
    return open_gguf(folder / "m.gguf").config


def test_the_config(tmp_path):
    ids = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 2}
    assert config_of(tmp_path, **ids) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "vocab_size": VOCAB,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "float32",
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"eos_token_id": 2}, 2),
        ({"eos_token_id": 2, "eot_token_id": 5, "eom_token_id": 6}, [2, 5, 6]),
        ({"eos_token_id": 1, "eot_token_id": 1, "tokens": ["a", "</s>", "<|eot_id|>"]}, [1, 2]),
    ],
)
def test_all_that_ends_a_text(tmp_path, changes, expected):
    assert config_of(tmp_path, **{f"tokenizer.ggml.{k}": v for k, v in changes.items()})["eos_token_id"] == expected
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.stops == (() if expected is None else tuple(np.atleast_1d(expected)))


def test_an_output_matrix_unties_the_head(tmp_path):
    assert config_of(tmp_path, tied=False)["tie_word_embeddings"] is False


def test_biases_are_named_and_their_heads_put_back(tmp_path):
    bias = np.arange(KV_HEADS * HEAD_DIM, dtype=np.float32)
    stored = halves_interleaved(bias, KV_HEADS)
    more = {"blk.0.attn_k.bias": stored, "blk.0.attn_q.bias": np.zeros(256, np.float32)}
    assert config_of(tmp_path, more_tensors=more)["attention_bias"]
    found = open_checkpoint(tmp_path / "m.gguf").read("model.layers.0.self_attn.k_proj.bias")
    np.testing.assert_array_equal(found, bias)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ],
)
def test_rope_scaling(tmp_path, changes, expected):
    assert config_of(tmp_path, **{f"llama.rope.scaling.{k}": v for k, v in changes.items()})["rope_scaling"] == expected


def test_rope_scaling_of_llama_3_is_found_from_its_factors(tmp_path):
    factors = llama3_factors(LLAMA3, 5e5, HEAD_DIM).astype(np.float32)
    more = {"rope_freqs.weight": factors}
    config = config_of(tmp_path, more_tensors=more, **{"llama.rope.freq_base": 5e5})
    assert config["rope_scaling"] == LLAMA3
    assert "rope_freqs.weight" not in open_checkpoint(tmp_path / "m.gguf").names
    with pytest.raises(InputError, match=r"rope_freqs\.weight is not what Llama 3's rule gives"):
        config_of(tmp_path, more_tensors={"rope_freqs.weight": factors + np.float32(0.1)})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'; 'none' and 'linear' are read"),
        ({"llama.rope.dimension_count": 16}, "rotates 16 of the 32 channels"),
        ({"llama.block_count": None}, "llama.block_count is None, not one int"),
        ({"llama.feed_forward_length": [1, 2]}, r"llama.feed_forward_length is \[1, 2\]"),
        (
            {"llama.attention.head_count": 5, "llama.rope.dimension_count": 51},
            r"attn_q.weight has shape \(256, 256\), not 5 heads of 51",
        ),
        ({"split.count": 3}, "one of 3 parts: join them"),
    ],
)
def test_metadata_that_is_not_read(tmp_path, changes, says):
    with pytest.raises(InputError, match=rf"m\.gguf.*{says}"):
        config_of(tmp_path, **changes)


def test_two_rules_for_the_rope_are_not_combined(tmp_path):
    more = {"rope_freqs.weight": llama3_factors(LLAMA3, 1e4, HEAD_DIM).astype(np.float32)}
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    with pytest.raises(InputError, match=r"has rope_freqs\.weight and llama\.rope\.scaling\.type 'linear'"):
        config_of(tmp_path, more_tensors=more, **linear)


@pytest.mark.parametrize("moved", [-32, 32, -(10**6), 10**6])
def test_tensors_follow_one_another_without_gaps(tmp_path, moved):
    """As llama.cpp asks: an offset into the header, into the tensor before or beyond it reads other numbers."""
    write_gguf(tmp_path / "m.gguf", llama_weights())
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    at = data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8 + 4
    offset = int.from_bytes(data[at : at + 8], "little")
    data[at : at + 8] = ((offset + moved) % 2**64).to_bytes(8, "little")
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(InputError, match=r"output_norm\.weight starts at byte .*damaged"):
        open_checkpoint(tmp_path / "m.gguf")


def test_another_architecture(tmp_path):
    write_gguf(tmp_path / "m.gguf", llama_weights(), architecture="qwen2")
    with pytest.raises(InputError, match="'qwen2'; only 'llama' is read from GGUF"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_exps.weight", "blk.0.attn_q_norm.weight", "ffn_up.weight", "odd"])
def test_a_tensor_that_a_llama_does_not_have(tmp_path, name):
    with pytest.raises(InputError, match=f"the tensor {name} has no place in a dense Llama"):
        config_of(tmp_path, more_tensors={name: np.zeros((4, 4), np.float32)})


def test_a_type_that_cannot_be_dequantized(tmp_path):
    with pytest.raises(InputError, match=r"output_norm\.bias is stored as I32, which the gguf package cannot"):
        config_of(tmp_path, more_tensors={"output_norm.bias": np.zeros(4, np.int32)})


def test_a_type_of_the_future(tmp_path):
    write_gguf(tmp_path / "m.gguf", llama_weights())
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    at = data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    data[at : at + 4] = (250).to_bytes(4, "little")
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(InputError, match=r"output_norm\.weight is stored in ggml type 250.*upgrade gguf"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize(("start", "says"), [(b"GGML", "no GGUF file"), (b"GGUF\0\0\0\3", "version .* or big-endian")])
def test_files_of_another_kind(tmp_path, start, says):
    (tmp_path / "m.gguf").write_bytes(start + bytes(64))
    with pytest.raises(InputError, match=rf"m\.gguf.*{says}"):
        open_checkpoint(tmp_path / "m.gguf")


@ft.cache
def small_file(folder):
    write_gguf(folder / "whole.gguf", llama_weights(), T.Q8_0, changes={"tokenizer.ggml.tokens": ["a", "b"]})
    return (folder / "whole.gguf").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


@given(part=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short_anywhere_says_so(folder, part):
    whole = small_file(folder)
    file = folder / "cut.gguf"
    file.write_bytes(whole[: int(part**4 * len(whole))])
    with pytest.raises(InputError, match=r"cut\.gguf"):
        open_checkpoint(file)


@given(at=st.integers(0, 2999), byte=st.integers(0, 255))
def test_a_damaged_header_is_an_input_error_or_harmless(folder, at, byte):
    damaged = bytearray(small_file(folder))
    damaged[at] = byte
    file = folder / "damaged.gguf"
    file.write_bytes(damaged)
    with contextlib.suppress(InputError):
        open_checkpoint(file).read("model.layers.0.self_attn.q_proj.weight")

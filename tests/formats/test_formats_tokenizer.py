"""Tokenizers built from GGUF metadata: byte-level and SentencePiece BPE, their splits and special tokens."""

import json

import pytest
from folders import llama_weights, write_gguf
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from vocabularies import TEXT, byte_level, sentencepiece

from awq_jax.errors import InputError
from awq_jax.formats.checkpoint import open_checkpoint
from awq_jax.formats.gguf.tokenizer import DIGIT_SPLITS, GPT2_SPLITS, REGEX_SPLITS, gguf_tokenizer, splitter


def pieces(metadata, text, **options):
    tokenizer = gguf_tokenizer(metadata)
    return tokenizer.convert_ids_to_tokens(tokenizer(text, **options).input_ids)


@pytest.mark.parametrize("pre", sorted(GPT2_SPLITS | DIGIT_SPLITS | REGEX_SPLITS.keys()))
@given(text=st.text(max_size=30))
def test_any_text_comes_back(pre, text):
    metadata = byte_level(pre)
    tokenizer = gguf_tokenizer(metadata)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


@given(text=st.text(max_size=30, alphabet=st.characters(codec="utf-8", exclude_characters="▁")))
@example(text="  a")
def test_any_text_comes_back_from_sentencepiece(text):
    tokenizer = gguf_tokenizer(sentencepiece())
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", [" ", " 12345", "."]),
        ("smollm", ["  ", "1", "2", "3", "4", "5", "."]),
        ("llama-bpe", [" ", " ", "123", "45", "."]),
        ("qwen2", [" ", " ", "1", "2", "3", "4", "5", "."]),
        ("default", [" ", " ", "123", "45", "."]),
    ],
)
def test_how_digits_are_split(pre, expected):
    text = "  12345."
    assert [text[a:b] for _, (a, b) in splitter(pre).pre_tokenize_str(text)] == expected


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["12", "Ġ", "Ġ1"]),
        ("default", ["12", "Ġ", "Ġ", "1"]),
        ("smollm", ["1", "2", "ĠĠ", "1"]),
        ("llama-bpe", ["<|im_start|>", "12", "Ġ", "Ġ", "1"]),
    ],
)
def test_no_merge_crosses_a_split(pre, expected):
    assert pieces(byte_level(pre), "12  1") == expected


def test_llama_3_takes_a_known_word_before_any_merge():
    assert pieces(byte_level("llama-bpe"), "world", add_special_tokens=False) == ["world"]
    assert pieces(byte_level("gpt-2"), "world") == list("world")


def test_a_byte_level_vocabulary_without_merges_is_refused():
    metadata = byte_level()
    del metadata["tokenizer.ggml.merges"]
    with pytest.raises(InputError, match=r"has no tokenizer\.ggml\.merges"):
        gguf_tokenizer(metadata)


def test_merges_apply_in_order_and_special_tokens_stay_whole():
    found = pieces(byte_level(), "hello<|im_start|> a<think>")
    assert found == ["hello", "<|im_start|>", "Ġa", "<think>"]
    assert pieces(sentencepiece(), "hello hello</s>a") == ["<s>", "▁hello", "▁hello", "</s>", "▁a"]


def test_sentencepiece_falls_back_to_bytes_and_prepends_a_space():
    assert pieces(sentencepiece(), "aé", add_special_tokens=False) == ["▁a", "<0xC3>", "<0xA9>"]
    found = pieces(sentencepiece(**{"tokenizer.ggml.add_space_prefix": False}), "a", add_special_tokens=False)
    assert found == ["a"]


@pytest.mark.parametrize(("bos", "eos"), [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("metadata", [byte_level, sentencepiece])
def test_first_and_last_tokens_are_what_the_file_asks_for(metadata, bos, eos):
    found = metadata(**{"tokenizer.ggml.add_bos_token": bool(bos), "tokenizer.ggml.add_eos_token": bool(eos)})
    tokenizer = gguf_tokenizer(found)
    ids = tokenizer("hello").input_ids
    assert (ids[0] == tokenizer.bos_token_id, ids[-1] == tokenizer.eos_token_id) == (bos, eos)
    assert len(ids) == 1 + bos + eos
    pair = tokenizer("a", "a").input_ids
    assert len(pair) == 2 * len(ids)


@pytest.mark.parametrize("metadata", [byte_level, sentencepiece])
def test_a_saved_tokenizer_is_the_same(tmp_path, metadata):
    write_gguf(tmp_path / "m.gguf", llama_weights(), changes=metadata())
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    ours = checkpoint.tokenizer()
    out = tmp_path / "out"
    out.mkdir()
    for file in checkpoint.companions:
        (out / file.name).write_bytes(file.read_bytes())
    (out / "config.json").write_text(json.dumps(checkpoint.config))
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs(TEXT).input_ids == ours(TEXT).input_ids
    assert theirs(TEXT, add_special_tokens=False).input_ids == ours(TEXT, add_special_tokens=False).input_ids
    ids = ours(TEXT).input_ids
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special_tokens=True)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_token_id, ours.eos_token_id)
    assert theirs.chat_template == ours.chat_template == metadata().get("tokenizer.chat_template")
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_chat_template_applies():
    tokenizer = gguf_tokenizer(byte_level())
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "hello", "<|im_end|>"]


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({}, "tokenizer.ggml.model is None"),
        (byte_level(**{"tokenizer.ggml.model": "bert"}), "tokenizer.ggml.model is 'bert'"),
        (byte_level("gemma4"), "tokenizer.ggml.pre is 'gemma4'; known are"),
        (
            {k: v for k, v in byte_level().items() if k != "tokenizer.ggml.pre"},
            "does not say how text is split .*gguf-new-metadata --pre-tokenizer",
        ),
        ({k: v for k, v in sentencepiece().items() if not k.endswith("scores")}, "neither tokenizer.ggml.scores"),
    ],
)
def test_a_tokenizer_that_is_not_built_here(metadata, says):
    with pytest.raises(InputError, match=says):
        gguf_tokenizer(metadata)

"""Fields of a config.json that say null."""

import pytest

from awq_jax.models import for_config
from awq_jax.models.fields import flag, real, share, whole, word

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda found: whole(found, "n"), "a whole number from 1"),
        (lambda found: whole(found, "n", 3), "a whole number from 1"),
        (lambda found: real(found, "n", 1e-6), "a positive number"),
        (lambda found: share(found, "n", 1.0), "a number above 0, at most 1"),
        (lambda found: word(found, "n", ("silu",), "silu"), "one of 'silu'"),
        (lambda found: flag(found, "n", True), "true or false"),
    ],
)
def test_null_is_no_number(read, expected):
    with pytest.raises(ValueError, match=f"the config has n=null: expected {expected}"):
        read({"n": None})


def test_null_is_none_or_false_where_these_are_the_defaults():
    assert whole({"n": None}, "n", None) is None
    assert flag({"n": None}, "n", False) is False


@pytest.mark.parametrize(
    ("architecture", "field"),
    [
        ("LlamaForCausalLM", "rms_norm_eps"),
        ("LlamaForCausalLM", "hidden_size"),
        ("LlamaForCausalLM", "rope_theta"),
        ("Gemma2ForCausalLM", "sliding_window"),
        ("Gemma2ForCausalLM", "query_pre_attn_scalar"),
        ("CohereForCausalLM", "logit_scale"),
        ("GPTNeoXForCausalLM", "layer_norm_eps"),
    ],
)
def test_fields_of_families(architecture, field):
    found = LLAMA | {"architectures": [architecture], field: None}
    with pytest.raises(ValueError, match=f"has {field}=null: expected"):
        for_config(found).config(found)


@pytest.mark.parametrize(
    ("architecture", "field"),
    [
        ("LlamaForCausalLM", "num_key_value_heads"),
        ("LlamaForCausalLM", "rope_scaling"),
        ("MistralForCausalLM", "sliding_window"),
        ("Gemma2ForCausalLM", "attn_logit_softcapping"),
    ],
)
def test_null_that_says_something_to_transformers(architecture, field):
    found = LLAMA | {"architectures": [architecture], field: None}
    assert for_config(found).config(found).positions == 512


def test_null_for_the_size_of_heads_is_what_the_width_gives():
    """transformers' Ernie has heads of 128 only where its file says nothing of them."""
    found = LLAMA | {"architectures": ["Ernie4_5ForCausalLM"]}
    of = lambda found: for_config(found).config(found).layers[0].head_dim
    assert (of(found), of(found | {"head_dim": None})) == (128, 16)

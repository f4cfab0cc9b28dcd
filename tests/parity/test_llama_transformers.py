"""The Llama decoder against transformers' LlamaForCausalLM on torch, float32."""

import numpy as np
import pytest
import torch
from tiny import CHANGES, config_of, hf_config, random_tokens
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from awq_jax.models import for_config
from awq_jax.models.decoder import Decoder
from awq_jax.models.generate import generate

LENGTH = 200


def pair(case, model_class=LlamaForCausalLM, config_class=LlamaConfig, **changes):
    """The same random model twice: transformers' and (config, params) of ours."""
    hf = hf_config(case, **changes)
    torch.manual_seed(0)
    theirs = model_class(config_class(**hf)).eval()
    with torch.no_grad():
        for name, w in theirs.named_parameters():
            spread = 2 * w.shape[1] ** -0.5 if w.ndim == 2 and "embed" not in name else 0.2
            w.copy_(torch.randn_like(w) * spread + (1 if "norm" in name else 0))
    tensors = theirs.state_dict()
    family = for_config(hf)
    config = family.config(hf)
    return theirs, config, family.load(lambda name: tensors[name].numpy(), config)


def difference(theirs, config, params):
    tokens = random_tokens(config, length=LENGTH)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    assert expected.std() > 0.5
    return np.abs(Decoder(config).apply({"params": params}, tokens) - expected).max()


@pytest.mark.parametrize("case", CHANGES)
def test_logits(case):
    assert difference(*pair(case)) < 1e-4


def test_logits_of_a_mistral_without_a_window():
    theirs, config, params = pair(
        "grouped heads",
        MistralForCausalLM,
        lambda **hf: MistralConfig(**hf, sliding_window=None),
        architectures=["MistralForCausalLM"],
        model_type="mistral",
    )
    assert difference(theirs, config, params) < 1e-4


@pytest.mark.parametrize("case", CHANGES)
def test_a_config_that_transformers_has_written_is_read_alike(case):
    hf = hf_config(case)
    written = LlamaConfig(**hf).to_diff_dict()
    assert config_of(written) == config_of(hf)


def their_greedy(theirs, tokens, count, eos=None):
    with torch.no_grad():
        return theirs.generate(
            torch.from_numpy(tokens).long(),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos[0] if eos else 0,
        ).numpy()


@pytest.mark.parametrize("case", ["grouped heads", "tied head", "llama3 rope, v4 style", "biases"])
def test_greedy_generation(case):
    theirs, config, params = pair(case)
    theirs.generation_config.eos_token_id = None
    tokens = random_tokens(config, length=9)
    expected = their_greedy(theirs, tokens, 24)
    np.testing.assert_array_equal(generate(config, params, tokens, max_new_tokens=24), expected)


def test_generation_up_to_eos():
    theirs, config, params = pair("grouped heads")
    theirs.generation_config.eos_token_id = None
    tokens = random_tokens(config, length=9)
    free = their_greedy(theirs, tokens, 12)
    eos = [int(free[0, 11]), int(free[1, 14])]
    expected = their_greedy(theirs, tokens, 12, eos)
    found = np.asarray(generate(config, params, tokens, max_new_tokens=12, eos=eos))
    assert expected.shape[1] < found.shape[1]
    np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)
    assert (found[:, expected.shape[1] :] == eos[0]).all()

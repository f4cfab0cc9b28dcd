"""A model of transformers' code in memory: what it says, how far another is from it, what went wrong in it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_families import folder

import awq_jax as awq
from awq_jax.errors import InputError
from awq_jax.models.generate import Speed, made_dense
from awq_jax.pipeline.answers import answer, distance
from awq_jax.pipeline.load import opened
from awq_jax.pipeline.not_finite import origin
from awq_jax.pipeline.score import score
from awq_jax.torch_bridge import trace

PROMPT = np.arange(5, 17, dtype=np.int32)
SETTINGS = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The described model, that with params, transformers' own, and how often torch exported."""
    one = {"num_layers": 1, "num_hidden_layers": 1, "attention_types": [[["global"], 1]]}
    path, theirs = folder(tmp_path_factory.mktemp("bridged") / "m", "gpt_neo", **one)
    exports = []
    with pytest.MonkeyPatch.context() as patch:
        original = trace.exported
        patch.setattr(trace, "exported", lambda *args: exports.append(1) or original(*args))
        described, read = opened(path)
        yield described, read(), theirs.eval(), exports


@pytest.fixture(scope="module")
def said(both):
    return answer(both[1], PROMPT, SETTINGS, "one")


def test_an_answer_is_that_of_transformers(both, said):
    described, model, theirs, exports = both
    with torch.no_grad():
        want = theirs.generate(torch.tensor(PROMPT[None]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert said["tokens"] == want[0, len(PROMPT) :].tolist()
    assert (said["asked"], said["prefill"] > 0, said["decode"] > 0) == (12, True, True)
    speed = Speed()
    described.stream(PROMPT, **SETTINGS)
    assert "".join(model.stream(PROMPT, **SETTINGS, speed=speed)) == said["text"].lstrip()
    assert (speed.prompt, speed.tokens, speed.compiling > 0) == (12, 4, True)
    model.logits(np.zeros((1, 64), np.int32))
    assert len(exports) == 1  # One shape, whoever asks: for memory, logits, or tokens.


def test_distances_along_an_answer(both, said):
    model = both[1]
    assert set(distance(model, model, (PROMPT, PROMPT), said, "one")["kl"]) == {0.0}
    other = replace(model, params={**model.params, "transformer.ln_f.bias": model.params["transformer.ln_f.bias"] + 1})
    found = distance(other, model, (PROMPT, PROMPT), said, "one")
    tokens = np.concatenate([PROMPT, said["tokens"]])[None]

    def chances(one):
        odds = np.exp(np.asarray(one.logits(tokens)[0, len(PROMPT) - 1 : -1], np.float64))
        odds = np.c_[np.delete(odds, one.eos, -1), odds[:, one.eos].sum(-1)]  # To end is one outcome.
        return odds / odds.sum(-1, keepdims=True)

    p, q = chances(model), chances(other)
    np.testing.assert_allclose(found["kl"], (p * np.log(p / q)).sum(-1), 2e-3)


def test_a_param_that_is_no_number_is_named(both, said):
    model = both[1]
    name = "transformer.h.0.mlp.c_fc.weight"
    broken = replace(model, params={**model.params, name: model.params[name].at[3, 4].set(jnp.nan)})
    assert origin(broken, PROMPT[None]) == name
    with pytest.raises(InputError, match=rf"one: .*not finite from {name} on"):
        answer(broken, PROMPT, SETTINGS, "one")
    with pytest.raises(InputError, match=rf"the model's logits are NaN or infinite \(from {name} on\)"):
        distance(broken, model, (PROMPT, PROMPT), said, "one")
    with pytest.raises(InputError, match=rf"window 0: .*the model's logits \(from {name} on\)"):
        score(broken, np.pad(PROMPT, (0, 52))[None])


def test_an_answer_that_memory_does_not_hold_is_refused_unread(both, monkeypatch):
    monkeypatch.setattr("awq_jax.memory.free_memory", lambda: 1000)
    with pytest.raises(InputError, match=r"max_new_tokens=4 after a prompt of 12 takes about .* GB"):
        both[0].stream(PROMPT, **SETTINGS)


def test_whole_numbers_stay_such_when_matrices_are_made_dense(both):
    params = {"positions": jnp.arange(6).reshape(1, 6), "half": jnp.ones((2, 2), jnp.float16)}
    found = made_dense(both[1].config, params)
    assert {name: w.dtype for name, w in found.items()} == {"positions": jnp.int32, "half": jnp.float32}


def test_what_predicts_no_next_token_is_neither_compared_nor_scored(tmp_path):
    path, _ = folder(tmp_path / "bert", "bert", num_hidden_layers=1)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "What is it?"}\n')
    for command in (
        lambda: awq.compare(path, tmp_path, prompts, tmp_path / "runs.sqlite"),
        lambda: awq.evaluate(path, prompts),
    ):
        with pytest.raises(InputError, match=r"BertForMaskedLM writes no text: it predicts no next token"):
            command()


def test_a_model_without_a_head_says_so(both):
    found = both[0].family.model
    headless = replace(found, model=found.inner, params={})
    params = {name.removeprefix("transformer."): w for name, w in found.params.items()}
    with pytest.raises(
        InputError, match=r"GPTNeoModel gives last_hidden_state and no logits: give a model with a head"
    ):
        jax.eval_shape(headless.logits, params, jax.ShapeDtypeStruct((1, 4), jnp.int32))

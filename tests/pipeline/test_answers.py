"""What is measured along an answer, against numpy in float64, and what it makes of lost templates and stop tokens."""

from dataclasses import replace

import numpy as np
import pytest
from checkpoints import tiny_folder

from awq_jax.errors import InputError
from awq_jax.pipeline.answers import answer, distance, outcomes, tokens_of
from awq_jax.pipeline.load import load
from awq_jax.records.prompt import Prompt

PROMPTS = [Prompt("one", ({"role": "user", "content": "What is it?"},)), Prompt("two", "Once upon a time")]
SETTINGS = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load(tiny_folder(tmp_path_factory.mktemp("answers") / "m"))


@pytest.fixture(scope="module")
def asked(base):
    return tokens_of(base, PROMPTS)


@pytest.fixture(scope="module")
def said(base, asked):
    return answer(base, asked[0], SETTINGS, "one")


def stopping(model, token):
    """The same model with that token for its only end."""
    tokenizer = model.tokenizer.__class__(tokenizer_object=model.tokenizer.backend_tokenizer, bos_token="<|im_start|>")
    tokenizer.chat_template = model.tokenizer.chat_template
    return replace(model, stops=(token,), tokenizer=tokenizer)


def test_prompts_are_asked_through_the_template_and_texts_as_they_are(base, asked):
    words = [base.tokenizer.decode(tokens) for tokens in asked]
    assert words == ["<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n", "Once upon a time"]


def test_an_answer_is_what_the_model_streams(base, asked, said):
    assert said["text"].lstrip() == "".join(base.stream(asked[0], max_new_tokens=12))
    assert (len(said["tokens"]), said["stopped"], said["asked"]) == (12, False, len(asked[0]))
    assert said["ends"] == sorted(said["ends"])
    sampled = answer(base, asked[0], {**SETTINGS, "temperature": 1.0, "seed": 3}, "one")
    assert sampled["text"].lstrip() == "".join(base.stream(asked[0], max_new_tokens=12, temperature=1.0, seed=3))


def test_an_answer_that_ends_by_itself_is_without_the_stop(base, asked, said):
    stop = said["tokens"][5]
    first = said["tokens"].index(stop)
    found = answer(stopping(base, stop), asked[0], SETTINGS, "one")
    assert (found["tokens"], found["stopped"]) == (said["tokens"][:first], True)


def other_weights(model, seed=1):
    rng = np.random.default_rng(seed)
    head = model.params["head"]["kernel"]
    return replace(
        model, params={**model.params, "head": {"kernel": head + 0.3 * rng.normal(size=head.shape).astype("f")}}
    )


def test_kl_and_loss_are_their_definitions(base, asked, said):
    model = other_weights(base)
    whole = np.concatenate([asked[0], said["tokens"]])[None]
    at = slice(len(asked[0]) - 1, -1)
    p, q = (np.exp(np.asarray(one.logits(whole)[0, at], np.float64)) for one in (base, model))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    k = np.arange(12)
    found = distance(model, base, (asked[0], asked[0]), said, "one")
    np.testing.assert_allclose(found["kl"], (p * np.log(p / q)).sum(-1), 2e-3)
    np.testing.assert_allclose(found["more"], np.log(p / q)[k, said["tokens"]], 2e-3, 1e-4)
    assert found["same"] == (p.argmax(-1) == q.argmax(-1)).tolist()
    itself = distance(base, base, (asked[0], asked[0]), said, "one")
    assert (set(itself["kl"]), set(itself["same"])) == ({0.0}, {1})


def test_the_end_is_one_outcome_of_all_stop_tokens():
    logits = np.random.default_rng(0).normal(size=(3, 9)).astype("f")
    found = np.asarray(outcomes(logits, np.array([2, 5], np.int32)))
    assert found.shape == (3, 10)
    np.testing.assert_allclose(np.exp(found[:, 9]), np.exp(logits[:, [2, 5]]).sum(-1), 1e-5)
    chances = np.exp(found) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(chances.sum(-1), 1, 1e-5)
    assert chances[:, [2, 5]].max() < 1e-20
    assert np.asarray(outcomes(logits, np.zeros(0, np.int32)))[:, 9].max() < -40


def test_another_stop_token_is_far_at_the_end(base, asked, said):
    stop = said["tokens"][5]
    ends = stopping(base, stop)
    short = answer(ends, asked[0], SETTINGS, "one")
    found = distance(stopping(base, (stop + 1) % 300), ends, (asked[0], asked[0]), short, "one")
    assert len(found["kl"]) == len(short["tokens"]) + 1
    assert found["same"][-1] == 0
    assert found["kl"][-1] > 1
    assert distance(ends, ends, (asked[0], asked[0]), short, "one")["kl"][-1] == 0


def test_a_lost_template_is_far_all_along(base, asked, said, monkeypatch):
    monkeypatch.setattr(base.tokenizer, "chat_template", None)
    plain = tokens_of(base, PROMPTS)
    assert "What is it?" in base.tokenizer.decode(plain[0])
    assert "<|im_end|>" not in base.tokenizer.decode(plain[0])
    found = distance(base, base, (plain[0], asked[0]), said, "one")
    assert np.mean(found["kl"]) > 0.05


def test_an_empty_answer_has_its_end_alone(base, asked, said):
    ends = stopping(base, said["tokens"][0])
    empty = answer(ends, asked[0], SETTINGS, "one")
    assert (empty["text"], empty["tokens"], empty["stopped"]) == ("", [], True)
    assert len(distance(other_weights(ends), ends, (asked[0], asked[0]), empty, "one")["kl"]) == 1


def test_logits_that_are_no_numbers_name_prompt_and_layer(base, asked, said):
    broken = replace(base, params={**base.params, "layers_1": {**base.params["layers_1"]}})
    mlp = dict(broken.params["layers_1"]["mlp"])
    mlp["down"] = {"kernel": mlp["down"]["kernel"] * np.float32("nan")}
    broken.params["layers_1"]["mlp"] = mlp
    with pytest.raises(InputError, match=r"one: .*not finite from layer 1 on"):
        answer(broken, asked[0], SETTINGS, "one")
    with pytest.raises(InputError, match=r"one: the model's logits are NaN or infinite \(from layer 1 on\)"):
        distance(broken, base, (asked[0], asked[0]), said, "one")

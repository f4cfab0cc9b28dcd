"""Tokens and text one after another: the same as all at once, nothing compiled on the way."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import tokenizer
from compilations import compilations
from hypothesis import given
from hypothesis import strategies as st
from tiny import hf_config, random_params, random_tokens
from vocabularies import byte_level

from awq_jax.errors import InputError
from awq_jax.formats.gguf.tokenizer import gguf_tokenizer
from awq_jax.models.families.llama import LLAMA
from awq_jax.models.generate import Sampling, Speed, draw, generate, stream
from awq_jax.models.pieces import pieces
from awq_jax.pipeline.load import Model

CONFIG = LLAMA.config(hf_config(num_hidden_layers=1, vocab_size=90, max_position_embeddings=100))
PARAMS = random_params(CONFIG)
WARM = {"temperature": 1.5, "top_p": 0.7, "key": jax.random.key(3)}


@pytest.mark.parametrize("how", [{}, WARM], ids=["likeliest", "drawn"])
def test_a_stream_is_what_generate_gives_and_compiles_nothing_on_the_way(how):
    whole, said = {}, {}
    for t, most in ((5, 12), (9, 3)):
        tokens = random_tokens(CONFIG, 1, t)
        whole[t] = np.asarray(generate(CONFIG, PARAMS, tokens, max_new_tokens=most, **how))[0, t:].tolist()
    with compilations() as compiled, warnings.catch_warnings():
        warnings.simplefilter("error")
        for t, most in ((5, 12), (9, 3)):
            tokens = random_tokens(CONFIG, 1, t)
            said[t] = list(stream(CONFIG, PARAMS, tokens[0], max_new_tokens=most, **how))
    assert said == whole
    assert (compiled["first"], compiled["following"]) == (1, 1)


def test_one_token_is_a_stream_too():
    tokens = random_tokens(CONFIG, 1, 5)
    whole = np.asarray(generate(CONFIG, PARAMS, tokens, max_new_tokens=1))[0, 5:].tolist()
    assert list(stream(CONFIG, PARAMS, tokens[0], max_new_tokens=1)) == whole


def test_a_stop_token_ends_a_stream_and_is_not_among_it():
    (tokens,) = random_tokens(CONFIG, 1, 5)
    free = list(stream(CONFIG, PARAMS, tokens, max_new_tokens=8))
    speed = Speed()
    found = list(stream(CONFIG, PARAMS, tokens, max_new_tokens=8, eos=(free[4],), speed=speed))
    assert found == free[: free.index(free[4])]
    assert (speed.prompt, speed.tokens) == (5, len(found) + 1)
    assert min(speed.prefill, speed.decode) > 0
    assert str(speed).startswith("prompt: 5 tokens, ")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: give 1"),
        ({"max_new_tokens": 97}, "max_new_tokens=97 after a prompt of 5: 101 tokens, .* give max_new_tokens=96 or"),
        ({"max_new_tokens": 1, "top_p": 0.0}, r"top_p=0.0: give a probability"),
        ({"max_new_tokens": 1, "top_p": 1.1}, "top_p=1.1"),
        ({"max_new_tokens": 1, "temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_numbers_out_of_range_are_refused_before_the_first_token(options, says):
    with pytest.raises(ValueError, match=says):
        stream(CONFIG, PARAMS, random_tokens(CONFIG, 1, 5)[0], **options)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (np.array([[5, 6, 7]]), r"the prompt's tokens have shape \(1, 3\): give those of one prompt"),
        (5, r"the prompt's tokens have shape \(\)"),
        (b"text", r"the prompt's tokens have shape \(\)"),
        ([5.7, 6.2], "the prompt: tokens are float64, expected are integers"),
        (np.array([True]), "the prompt: tokens are bool"),
    ],
)
def test_tokens_of_another_shape_or_type_are_refused(tokens, says):
    model = Model(LLAMA, CONFIG, PARAMS, tokenizer())
    with pytest.raises(InputError, match=says):
        model.stream(tokens)
    assert "".join(model.stream([5, 6], max_new_tokens=1)) == model.generate(np.array([5, 6]), max_new_tokens=1)


def test_a_batch_of_another_shape_or_type_is_refused():
    model = Model(LLAMA, CONFIG, PARAMS, tokenizer())
    with pytest.raises(InputError, match=r"tokens have shape \(2,\): give \[batch, length\]"):
        model.logits(np.array([5, 6]))
    for call in (model.logits, lambda tokens: generate(CONFIG, PARAMS, tokens, max_new_tokens=1)):
        with pytest.raises(InputError, match="tokens are float32, expected are integers"):
            call(np.array([[5.7]], np.float32))


@given(seed=st.integers(0, 2**32 - 1), p=st.floats(0.01, 0.999), temperature=st.sampled_from([0.5, 1.0, 3.0]))
def test_top_p_draws_from_the_fewest_tokens_that_reach_it(seed, p, temperature):
    logits = np.random.default_rng(seed).normal(size=7).astype(np.float32) * 2
    chances = np.exp(logits.astype(np.float64) / temperature)
    chances /= chances.sum()
    order = np.argsort(-chances)
    reached = np.cumsum(chances[order])
    if np.abs(reached - p).min() < 1e-5:
        return
    kept = order[: (reached < p).sum() + 1]
    drawn = DRAW(jnp.asarray(logits), jax.random.key(seed % 1000), temperature, p)
    found = np.bincount(drawn, minlength=7) / len(drawn)
    expected = np.where(np.isin(np.arange(7), kept), chances, 0) / chances[kept].sum()
    assert set(np.flatnonzero(found)) <= set(kept)
    np.testing.assert_allclose(found, expected, atol=0.05)


DRAW = jax.jit(lambda logits, key, temperature, p: draw(jnp.tile(logits, (2000, 1)), 0, Sampling(key, temperature, p)))


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45, 1e-300])
@pytest.mark.parametrize("p", [None, 0.9])
def test_a_temperature_near_0_takes_the_likeliest_token(temperature, p):
    logits = jnp.asarray([[-3.0, 89.0, 90.0, 5.0]])
    drawn = jax.jit(draw)(logits, 0, Sampling(jax.random.key(0), temperature, p))
    assert drawn.tolist() == [2]


TOKENIZERS = {"byte level": tokenizer, "GGUF": lambda: gguf_tokenizer(byte_level())}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
def test_pieces_are_the_text(kind, data):
    model = TOKENIZERS[kind]()
    ids = data.draw(st.lists(st.integers(0, len(model) - 1), max_size=12))
    text = data.draw(st.text(max_size=8))
    ids += model(text, add_special_tokens=False).input_ids
    assert "".join(pieces(model, ids)) == model.decode(ids, skip_special_tokens=True).strip()


def test_a_letter_of_several_tokens_comes_whole_and_white_space_with_what_follows():
    ids = tokenizer()(" \n a🙂é b \n").input_ids
    shown = list(pieces(tokenizer(), ids))
    assert "".join(shown) == "a🙂é b"
    assert "�" not in "".join(shown)
    assert len(shown) == 4
    assert shown[-1] == " b"


def test_a_piece_comes_before_the_next_token_is_asked_for():
    asked = []

    def tokens():
        for token in tokenizer()("one two").input_ids:
            asked.append(token)
            yield token

    next(pieces(tokenizer(), tokens()))
    assert len(asked) < len(tokenizer()("one two").input_ids)


def test_logits_that_are_no_numbers_are_told_instead_of_a_token():
    (tokens,) = random_tokens(CONFIG, 1, 5)
    broken = PARAMS | {"norm": {"scale": PARAMS["norm"]["scale"].at[3].set(jnp.nan)}}
    for how in ({}, WARM):
        with pytest.raises(InputError, match="token 5: the model's logits are NaN or infinite"):
            next(stream(CONFIG, broken, tokens, max_new_tokens=4, **how))
    with pytest.raises(InputError, match="calib='self': the model's logits are NaN or infinite"):
        Model(LLAMA, CONFIG, broken, tokenizer()).sample(2, 3)


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 10**30])
def test_a_seed_of_more_than_64_bits_is_refused(seed):
    with pytest.raises(InputError, match=f"seed={seed}: give a number of 64 bits"):
        Model(LLAMA, CONFIG, PARAMS, tokenizer()).stream("a", seed=seed)

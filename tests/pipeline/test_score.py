"""Scores against their definitions in numpy, and the windows that they are taken on."""

from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import tokenizer
from hypothesis import given
from hypothesis import strategies as st

from awq_jax.errors import InputError
from awq_jax.pipeline.score import check_same_tokens, score, windows

VOCAB = 11


@dataclass
class Table:
    """A model that looks a row of logits up for each token; it keeps what it was asked."""

    rows: np.ndarray
    asked: list = field(default_factory=list)

    def logits(self, tokens):
        self.asked.append(np.asarray(tokens))
        return jnp.asarray(self.rows, jnp.float32)[tokens]


def table(seed):
    return Table(np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)) * 3)


def probabilities(rows):
    odds = np.exp(rows - rows.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def reference_scores(model, dense, tokens):
    """Perplexity, KL and agreement, one token at a time in float64."""
    q, p = probabilities(model.rows), probabilities(dense.rows)
    losses = [-np.log(q[a, b]) for row in tokens for a, b in pairwise(row)]
    divergence = [(p[a] * np.log(p[a] / q[a])).sum() for a in tokens.ravel()]
    same = [q[a].argmax() == p[a].argmax() for a in tokens.ravel()]
    return np.exp(np.mean(losses)), np.mean(divergence), np.mean(same)


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 3), length=st.sampled_from([2, 9]))
def test_scores_are_their_definitions(seed, n, length):
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (n, length), dtype=np.int32)
    model, dense = table(seed), table(seed + 1)
    found = score(model, tokens, dense)
    np.testing.assert_allclose((found.perplexity, found.kl, found.top1), reference_scores(model, dense, tokens), 1e-4)
    assert found.tokens == n * (length - 1)


def test_a_model_is_no_distance_from_itself():
    tokens = np.arange(8, dtype=np.int32).reshape(2, 4)
    found = score(table(0), tokens, table(0))
    assert (found.kl, found.top1) == (0.0, 1.0)


def test_without_a_reference_there_is_perplexity_only():
    tokens = np.arange(8, dtype=np.int32).reshape(2, 4)
    found = score(table(0), tokens)
    assert (found.kl, found.top1) == (None, None)
    assert found.perplexity == pytest.approx(reference_scores(table(0), table(0), tokens)[0], rel=1e-5)


def test_likely_and_impossible_tokens_stay_finite():
    sure = Table(np.eye(VOCAB) * 1e4)
    found = score(sure, np.zeros((1, 4), np.int32), Table(-sure.rows))
    assert found.perplexity == pytest.approx(1.0)
    assert np.isfinite(found.kl)
    assert found.kl > 1e3


def test_each_window_is_a_text_of_its_own_and_progress_is_told():
    model, told = table(0), []
    tokens = np.arange(9, dtype=np.int32).reshape(3, 3)
    score(model, tokens, progress=lambda *done: told.append(done))
    assert [a.tolist() for a in model.asked] == [[[0, 1, 2]], [[3, 4, 5]], [[6, 7, 8]]]
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_windows_are_the_start_of_the_text_in_order():
    text = "the people of the United States and all the nations of the world, " * 20
    ids = tokenizer()(text, add_special_tokens=False).input_ids
    found = windows(text, tokenizer(), 3, 16)
    assert (found.shape, found.dtype) == ((3, 16), np.int32)
    assert found.ravel().tolist() == ids[:48]
    assert windows(text, tokenizer(), 10**6, 16).shape == (len(ids) // 16, 16)


@pytest.mark.parametrize(
    ("text", "n", "length", "says"),
    [
        ("ab", 1, 1024, "the text has 2 tokens, one window takes 1024: give length=2"),
        ("", 1, 1024, "has 0 tokens, one window takes 1024: give a longer text"),
        ("ab", 0, 1024, "windows=0 length=1024: give 1 or more windows"),
        ("ab", 1, 1, "windows=1 length=1: .* of 2 tokens or more"),
    ],
)
def test_windows_that_cannot_be(text, n, length, says):
    with pytest.raises(InputError, match=says):
        windows(text, tokenizer(), n, length)


def test_models_that_read_a_text_otherwise_are_not_compared():
    of = lambda vocab, words: SimpleNamespace(config=SimpleNamespace(vocab=vocab), tokenizer=words)
    words, text = tokenizer(), "the sky is blue " * 40
    other = lambda text, **options: SimpleNamespace(input_ids=[1 + i for i in words(text, **options).input_ids])
    model, tokens = of(9, words), windows(text, words, 2, 8)
    check_same_tokens(model, of(9, words), text, tokens, "dense")
    with pytest.raises(InputError, match="dense has 7 tokens and the model 9"):
        check_same_tokens(model, of(7, words), text, tokens, "dense")
    with pytest.raises(InputError, match="dense reads the text as other tokens"):
        check_same_tokens(model, of(9, other), text, tokens, "dense")

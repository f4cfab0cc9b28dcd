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
from awq_jax.pipeline.by_token import by_token
from awq_jax.pipeline.evaluate import evaluate
from awq_jax.pipeline.same_tokens import check_same_tokens
from awq_jax.pipeline.score import score, windows
from awq_jax.pipeline.windows import CONVENTIONS, Convention, Passage, Window, cut

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


def reference_scores(model, dense, windows):
    """All figures, one token at a time in float64."""
    q, p = probabilities(model.rows), probabilities(dense.rows)
    found = []
    for k, w in enumerate(windows):
        for (a, b), counts in zip(pairwise(w.tokens), w.counts[1:], strict=True):
            if counts:
                kl = (p[a] * np.log(p[a] / q[a])).sum()
                five = {*p[a].argsort()[-5:]} & {*q[a].argsort()[-5:]}
                same = q[a].argmax() == p[a].argmax()
                found.append((k, -np.log(q[a, b]), kl, same, len(five) / 5, np.log(p[a, b] / q[a, b])))
    k, loss, kl, same, five, more = np.array(found).T

    def error(x):
        """A jackknife over windows."""
        means = [x[k != one].mean() for one in np.unique(k)] if len(np.unique(k)) > 1 else x
        return np.sqrt((len(means) - 1) * np.var(means))

    return {
        "perplexity": np.exp(loss.mean()),
        "kl": kl.mean(),
        "top1": same.mean(),
        "tokens": len(k),
        "bits_per_byte": loss.mean() / np.log(2) / 3,
        "kl_median": np.median(kl),
        "kl_p99": np.percentile(kl, 99),
        "top5": five.mean(),
        "ratio": np.exp(more.mean()),
    }, {"kl": error(kl), "top1": error(same), "top5": error(five), "perplexity": np.exp(loss.mean()) * error(loss)}


def rows_of(tokens):
    return [Window(row, np.arange(len(row)) > 0) for row in tokens]


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 3), length=st.sampled_from([2, 9]))
def test_scores_are_their_definitions(seed, n, length):
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (n, length), dtype=np.int32)
    model, dense = table(seed), table(seed + 1)
    found = score(model, tokens, dense, token_bytes=3)
    expected, _ = reference_scores(model, dense, rows_of(tokens))
    np.testing.assert_allclose([getattr(found, name) for name in expected], list(expected.values()), 1e-4, 1e-6)
    assert bool(found.errors) == (n > 1)


def test_without_a_reference_nothing_is_compared():
    logits, targets = np.random.default_rng(0).normal(size=(4, VOCAB)).astype("f"), np.arange(4, dtype=np.int32)
    loss, *rest = by_token(logits, None, targets)
    np.testing.assert_allclose(loss, by_token(logits, logits, targets).loss)
    assert rest == [None] * 6


def test_standard_errors_are_those_of_windows_left_out():
    rng = np.random.default_rng(0)
    model, dense = table(0), table(1)
    windows = [Window(rng.integers(0, VOCAB, n, dtype=np.int32), rng.random(n) < 0.8) for n in rng.integers(40, 70, 60)]
    found = score(model, windows, dense)
    expected, errors = reference_scores(model, dense, windows)
    np.testing.assert_allclose(
        [getattr(found, name) for name in ("kl", "top1")], [expected["kl"], expected["top1"]], 1e-4
    )
    np.testing.assert_allclose([found.errors[name] for name in errors], list(errors.values()), 0.03)


def test_the_worst_tokens_come_with_what_stands_before_them():
    words = tokenizer()
    ids = np.arange(70, 80, dtype=np.int32)
    rows = np.random.default_rng(0).normal(size=(len(words), len(words)))
    other = rows.copy()
    other[ids[3]] += 20 * np.eye(len(words))[7]
    counts = np.arange(len(ids)) > 0
    found = score(Table(other), [Window(ids, counts)], Table(rows), tokenizer=words)
    first = found.worst[0]
    assert (first.before, first.token) == (words.decode(ids[:4]), words.decode(ids[4:5]))
    assert (first.reference, first.model) == (words.decode([rows[ids[3]].argmax()]), words.decode([7]))
    assert first.kl == max(one.kl for one in found.worst) > 5


@pytest.mark.parametrize(
    ("convention", "n", "starts", "counted"),
    [
        (Convention(None, 4), 10, [0, 4], [3, 3]),
        (Convention(1, 4), 10, [0], [3]),
        (Convention(None, 4, 2), 9, [0, 2, 4, 6], [3, 2, 2, 1]),
        (Convention(None, 4, 4, context=3), 10, [0, 4], [1, 1]),
        (CONVENTIONS["wikitext2"], 5000, [0, 2048], [2047, 2047]),
        (CONVENTIONS["llama.cpp"], 1100, [0, 512], [255, 255]),
        (CONVENTIONS["transformers"], 2000, [0, 512, 1024], [1023, 512, 464]),
    ],
)
def test_windows_by_convention(convention, n, starts, counted):
    found = cut([Passage(np.arange(n, dtype=np.int32), np.ones(n, bool))], convention)
    assert [w.tokens[0] for w in found] == starts
    assert [w.counts.sum() for w in found] == counted
    predicted = np.concatenate([w.tokens[w.counts] for w in found])
    assert len({*predicted}) == len(predicted)


def test_a_model_is_no_distance_from_itself():
    tokens = np.arange(8, dtype=np.int32).reshape(2, 4)
    found = score(table(0), tokens, table(0))
    assert (found.kl, found.top1) == (0.0, 1.0)


def test_without_a_reference_there_is_perplexity_only():
    tokens = np.arange(8, dtype=np.int32).reshape(2, 4)
    found = score(table(0), tokens)
    assert (found.kl, found.top1) == (None, None)
    assert found.perplexity == pytest.approx(
        reference_scores(table(0), table(0), rows_of(tokens))[0]["perplexity"], rel=1e-5
    )


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
    words, text = tokenizer(), "the sky is blue"

    class Other:
        def __call__(self, text, **options):
            ids = words(text, **options).input_ids
            return SimpleNamespace(input_ids=[*ids[:3], ids[3] + 1, *ids[4:]])

        def decode(self, ids, **options):
            return words.decode(ids, **options)

    ids = words(text).input_ids
    check_same_tokens(of(9, words), of(9, words), text, "dense")
    with pytest.raises(InputError, match="dense has 7 tokens and the model 9"):
        check_same_tokens(of(9, words), of(7, words), text, "dense")
    after = words.decode(ids[:3])
    with pytest.raises(InputError, match=f"token 3, after '{after}', is token {ids[3] + 1} .* and token {ids[3]} "):
        check_same_tokens(of(9, words), of(9, Other()), text, "dense")


def test_what_was_loaded_is_no_path(tmp_path):
    (text := tmp_path / "a.txt").write_text("words")
    with pytest.raises(InputError, match=r"^models has a SimpleNamespace: give the path"):
        evaluate(SimpleNamespace(), text)  # pyright: ignore[reportArgumentType]

"""Rounding with error feedback against GPTQ written with an explicit inverse, and what no rounding may do."""

import functools as ft

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import quick_jit
from reference import problem

from awq_jax.search import Feedback, no_clip, to_nearest
from awq_jax.search.moments import of
from awq_jax.weights.spec import QuantSpec

SPEC = QuantSpec(4, 32)


@ft.partial(quick_jit, static_argnames=("rounding", "spec", "block"))
def rounded(x, w, rounding, spec, block):
    m = of(x, block)
    return rounding(w, *no_clip(w, m, spec), m, spec)


def run(x, w, rounding, spec=SPEC, block=None):
    """Codes, steps and zeros as numpy arrays (i, o), the last two repeated down their groups."""
    codes, steps, zeros = rounded(x, w, rounding, spec, block)
    rows = lambda a: np.repeat(np.asarray(a), spec.group(len(w)), 0)[: len(w)]
    return np.asarray(codes).reshape(-1, w.shape[1])[: len(w)], rows(steps), rows(zeros)


def error(x, w, found):
    codes, steps, zeros = found
    return reference.output_errors(x, (codes - zeros) * steps - w)


def shrunk(x, shrink, size):
    """The mean Gram matrix shrunk towards its diagonal and completed to `size`, as Feedback has it."""
    gram = np.zeros((size, size))
    gram[: x.shape[1], : x.shape[1]] = x.T.astype(np.float64) @ x / len(x)
    diagonal = np.maximum(np.diag(gram), 1e-3 * np.diag(gram).mean())
    return gram * (1 - np.eye(size)) * (1 - shrink) + np.diag(diagonal)


CASES = {
    "two groups": (64, SPEC, False),
    "two groups, ordered": (64, SPEC, True),
    "half a group, ordered": (96, QuantSpec(4, 64), True),
    "padded column, symmetric": (80, QuantSpec(3, -1, symmetric=True), False),
}


@pytest.mark.parametrize(("features", "spec", "ordered"), list(CASES.values()), ids=list(CASES))
def test_codes_are_those_of_gptq(features, spec, ordered):
    x, w = problem(features, o=20)
    found, steps, zeros = run(x, w, Feedback(shrink=0.1, refit=False, ordered=ordered, sweeps=0), spec)
    size = features + spec.padding(features)
    gram = shrunk(x, 0.1, size)
    pad = lambda a, value: np.pad(a, ((0, size - features), (0, 0)), constant_values=value)
    order = np.argsort(-np.diag(gram), kind="stable") if ordered else np.arange(size)
    expected = reference.gptq(pad(w, 0), pad(steps, 1), pad(zeros, 0), gram, order, spec)[:features]
    assert (found == expected).mean() > 0.995
    assert (found != run(x, w, to_nearest, spec)[0]).mean() > 0.1


def test_blocks_of_the_gram_matrix_are_rounded_apart():
    x, w = problem(64, o=20)
    found = run(x, w, Feedback(), block=32)
    for rows in (slice(0, 32), slice(32, 64)):
        for a, b in zip(found, run(x[:, rows], w[rows], Feedback()), strict=True):
            np.testing.assert_array_equal(a[rows], b)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_error_is_below_that_of_rounding_to_nearest(seed):
    x, w = problem(64, o=20, seed=seed)
    assert error(x, w, run(x, w, Feedback())).sum() < error(x, w, run(x, w, to_nearest)).sum()


def test_refitted_steps_keep_the_codes_and_lower_the_error():
    x, w = problem(64, o=20)
    plain, refitted = (run(x, w, Feedback(shrink=0.0, refit=refit, sweeps=0)) for refit in (False, True))
    np.testing.assert_array_equal(plain[0], refitted[0])
    np.testing.assert_array_equal(refitted[1], refitted[1].astype(np.float16))
    assert (error(x, w, refitted) <= error(x, w, plain) * (1 + 1e-3)).all()
    assert error(x, w, refitted).sum() < 0.99 * error(x, w, plain).sum()


def test_to_nearest_is_to_nearest():
    x, w = problem(80)
    codes, steps, zeros = run(x, w, to_nearest)
    np.testing.assert_allclose((codes - zeros) * steps, reference.nearest(w, SPEC), rtol=1e-6)


def test_where_no_token_came_codes_are_the_nearest():
    x, w = problem(64, o=20)
    np.testing.assert_array_equal(run(0 * x, w, Feedback(sweeps=0))[0], run(x, w, to_nearest)[0])


def test_a_dead_channel_does_no_harm():
    x, w = problem(64, o=20)
    x[:, ::7] = 0
    found = run(x, w, Feedback())
    assert all(np.isfinite(a).all() for a in found)
    assert error(x, w, found).sum() < error(x, w, run(x, w, to_nearest)).sum()
    codes, _, zeros = found
    nearest = run(x, w, to_nearest)[0]
    assert (np.abs(codes - nearest)[::7] <= 1).mean() > 0.9
    assert ((codes >= 0) & (codes <= 15)).all()
    assert ((zeros >= 0) & (zeros <= 15)).all()


def test_fewer_tokens_than_channels_are_enough():
    x, w = problem(64, o=20, tokens=5)
    found = run(x, w, Feedback())
    assert all(np.isfinite(a).all() for a in found)
    assert error(x, w, found).sum() < error(x, w, run(x, w, to_nearest)).sum()


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_sweep_of_descent_never_raises_any_columns_error(seed):
    x, w = problem(64, o=20, seed=seed)
    once, swept = (run(x, w, Feedback(shrink=0.0, refit=False, sweeps=k)) for k in (0, 1))
    assert (error(x, w, swept) <= error(x, w, once) * (1 + 1e-3)).all()
    assert error(x, w, swept).sum() < error(x, w, once).sum()


def test_after_many_sweeps_no_single_code_can_be_better():
    x, w = problem(64, o=6)
    codes, steps, zeros = run(x, w, Feedback(shrink=0.0, refit=False, sweeps=20))
    least = error(x, w, (codes, steps, zeros))
    for row in range(0, 64, 5):
        for move in (-1, 1):
            other = codes.copy()
            other[row] = np.clip(other[row] + move, 0, 15)
            assert (error(x, w, (other, steps, zeros)) >= least * (1 - 1e-3)).all()

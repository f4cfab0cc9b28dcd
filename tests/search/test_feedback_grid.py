"""The scale that leaves the least error after rounding with error feedback, against trying each one after the other."""

import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick_jit
from reference import problem

from awq_jax.search import Feedback, FeedbackGrid, Grid, no_clip
from awq_jax.search.moments import of
from awq_jax.weights.spec import QuantSpec

RATIOS = (0.0, 0.3, 0.6, 0.9)


def error_of(x, w, s, spec, shrink):
    """The output error on the shrunk Gram matrix when x / s meets w * s, rounded with feedback."""
    m = of(x / s, None)
    scaled = w * s[:, None]
    rounding = Feedback(shrink=shrink, refit=False, sweeps=0)
    codes, steps, zeros = quick_jit(lambda w, m: rounding(w, *no_clip(w, m, spec), m, spec))(scaled, m)
    rows = lambda a: np.repeat(np.asarray(a), spec.group(len(w)), 0)[: len(w)]
    codes = np.asarray(codes).reshape(-1, w.shape[1])[: len(w)]
    change = (codes - rows(zeros)) * rows(steps) - scaled
    gram = np.asarray(m.mean_gram[0])
    gram = gram * (1 - shrink) + shrink * np.diag(np.diag(gram))
    return np.einsum("io,ij,jo->", change, gram, change)


@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(3, 64), QuantSpec(3, -1, symmetric=True)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_it_picks_what_feedback_rounds_best(spec, seed):
    x, w = problem(96, o=24, seed=seed)
    x = x * np.exp(np.random.default_rng(seed).normal(size=96)).astype(np.float32)
    grid, m = Grid(RATIOS, columns=0), of(x, None)
    scales = np.asarray(grid.candidates(jnp.asarray(w), m, spec))
    errors = [error_of(x, w, s, spec, 0.3) for s in scales]
    found = quick_jit(lambda w, m: FeedbackGrid(grid)(w, m, spec))(w, m)
    (picked,) = np.flatnonzero((np.abs(scales - np.asarray(found)) < 1e-6).all(1))
    assert errors[picked] <= min(errors) * 1.02
    assert max(errors) > min(errors) * 1.05


def test_candidates_are_powers_of_the_mean_input_between_their_extremes():
    x, w = problem(64, o=8)
    m = of(x, None)
    found = np.asarray(Grid(RATIOS).candidates(jnp.asarray(w), m, QuantSpec(4, 32)))
    for r, s in zip(RATIOS, found, strict=True):
        expected = np.abs(x).mean(0).astype(np.float64) ** r
        np.testing.assert_allclose(s, expected / np.sqrt(expected.max() * expected.min()), rtol=1e-4)


def test_a_few_columns_vote():
    x, w = problem(64, o=40)
    m, spec = of(x, None), QuantSpec(4, 32)
    some = quick_jit(lambda w, m: FeedbackGrid(Grid(RATIOS, columns=10))(w, m, spec))
    np.testing.assert_array_equal(some(w, m), some(w[:, ::4], m))

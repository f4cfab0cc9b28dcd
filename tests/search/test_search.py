"""The error that is minimised, the scales, and the whole solution, against numpy that replays the activations."""

import functools as ft
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from quick import quick_jit
from reference import problem

from awq_jax.search import Clip, Feedback, Grid, no_clip, solve, to_nearest
from awq_jax.search.loss import blocks, output_error
from awq_jax.search.moments import of
from awq_jax.search.scale.grid import relative_size, scale_error
from awq_jax.search.solve import by_columns, find_scale
from awq_jax.weights.spec import QuantSpec

G32, COLUMN = QuantSpec(4, 32), QuantSpec(4, -1)


def test_the_error_from_moments_is_that_of_the_activations():
    x, w = problem()
    change = reference.nearest(w, G32) - w
    np.testing.assert_allclose(output_error(change, of(x, None)), reference.output_errors(x, change), rtol=1e-4)


@pytest.mark.parametrize(
    ("features", "kept", "size"), [(96, 96, 32), (96, 32, 32), (96, 32, 64), (96, 64, 96), (80, 32, 64), (80, 48, 32)]
)
def test_blocks_are_cut_out_and_completed_with_zeros(features, kept, size):
    x = problem(features)[0]
    whole = np.zeros((192, 192))
    whole[:features, :features] = x.T @ x / len(x)
    known = np.arange(192)[:, None] // kept == np.arange(192) // kept
    expected = [(whole * known)[k : k + size, k : k + size] for k in range(0, features, size)]
    np.testing.assert_allclose(blocks(of(x, kept), size), expected, rtol=1e-3, atol=1e-3)


def scales_of(x, ratio):
    s = np.maximum(np.abs(x).mean(0), 1e-4) ** ratio
    return s / np.sqrt(s.max() * s.min())


def test_a_strategy_that_gives_another_shape_is_named():
    x, w = problem()
    i, o = w.shape
    three = lambda w, moments, spec: jnp.ones(3)
    with pytest.raises(ValueError, match=rf"scale that the strategy gave has shape \(3,\), expected \({i},\): one for"):
        find_scale(w, of(x, None), np.arange(i), n=i, spec=G32, strategy=three)
    one = lambda w, moments, spec: (jnp.zeros(()), jnp.ones(()))
    with pytest.raises(ValueError, match=rf"low that the strategy gave has shape \(\), expected \({i // 32}, {o}\)"):
        solve(w, of(x, None), spec=G32, clip=one, rounding=to_nearest)


RATIOS = tuple(i / 8 for i in range(9))


@ft.partial(quick_jit, static_argnames=("grid", "spec"))
def gridded(x, w, grid, spec):
    return grid(w, of(x, None), spec)


@ft.partial(quick_jit, static_argnames="spec")
def error_of(x, w, s, spec):
    return scale_error(w, s, of(x, None), spec)


@pytest.mark.parametrize(
    "spec", [G32, COLUMN, QuantSpec(3, 32, symmetric=True)], ids=["32", "column", "3 bits symmetric"]
)
def test_the_grid_finds_what_replaying_the_activations_finds(spec):
    picks = set()
    for seed in range(4):
        x, w = problem(seed=seed)
        errors = [reference.scaled_error(x, w, scales_of(x, r), spec) for r in RATIOS]
        found = gridded(x, w, Grid(RATIOS), spec)
        np.testing.assert_allclose(error_of(x, w, found, spec), min(errors), rtol=2e-3)
        np.testing.assert_allclose(found, scales_of(x, RATIOS[np.argmin(errors)]), rtol=1e-3)
        picks.add(int(np.argmin(errors)))
    assert len(picks) > 1


def test_the_weights_may_count_in_the_scale():
    x, w = problem()
    grouped = np.abs(w).reshape(2, 32, 6)
    size = (grouped / (grouped.max(1, keepdims=True) + 1e-6)).mean(-1).ravel()
    np.testing.assert_allclose(relative_size(jnp.asarray(w), G32), size, rtol=1e-5)

    def scales(r):
        s = np.maximum(np.abs(x).mean(0) ** r / (size ** (1 - r) + 1e-4), 1e-4)
        return s / np.sqrt(s.max() * s.min())

    errors = [reference.scaled_error(x, w, scales(r), G32) for r in RATIOS]
    found, plain, both = (gridded(x, w, Grid(RATIOS, duo=duo), G32) for duo in ("always", "never", "both"))
    np.testing.assert_allclose(found, scales(RATIOS[np.argmin(errors)]), rtol=1e-3)
    better = min(float(error_of(x, w, s, G32)) for s in (found, plain))
    assert float(error_of(x, w, both, G32)) == pytest.approx(better, rel=1e-4)


def test_some_columns_may_speak_for_all():
    x, w = problem(o=12)
    found = gridded(x, w, Grid(RATIOS, columns=4), G32)
    np.testing.assert_array_equal(found, gridded(x, w[:, ::3], Grid(RATIOS), G32))


def scaled_by(strategy, x, w, channels, n):
    """find_scale's factor by number, factor by channel, and error."""
    search = lambda w: find_scale(w, of(x, None), channels, n=n, spec=G32, strategy=strategy)
    factor, each, error = quick_jit(search)(w)
    return np.asarray(factor), np.asarray(each), float(error)


def terrible(w, moments, spec):
    return jnp.where(jnp.arange(len(w)) % 2, 1e3, 1e-3)


def test_no_scale_at_all_is_always_a_candidate():
    x, w = problem()
    factor, each, error = scaled_by(terrible, x, w, np.arange(64), 64)
    assert reference.scaled_error(x, w, np.where(np.arange(64) % 2, 1e3, 1e-3), G32) > 10 * error
    np.testing.assert_array_equal(factor, 1)
    np.testing.assert_array_equal(each, 1)
    assert error == pytest.approx(reference.scaled_error(x, w, np.ones(64), G32), rel=1e-3)


def test_a_scale_that_helps_is_taken_with_its_error():
    x, w = problem()
    _, each, error = scaled_by(Grid(), x, w, np.arange(64), 64)
    assert error == pytest.approx(reference.scaled_error(x, w, each, G32), rel=1e-3)
    assert error < 0.9 * reference.scaled_error(x, w, np.ones(64), G32)


def powers(w, moments, spec):
    return moments.mean_abs**0.3


def tilted(w, moments, spec):
    return powers(w, moments, spec) * jnp.where(jnp.arange(len(w)) % 2, 4.0, 0.25)


@pytest.mark.parametrize("strategy", [powers, tilted], ids=["one for both", "one each"])
def test_tied_channels_share_one_scale(strategy):
    rng = np.random.default_rng(0)
    sizes = np.concatenate([np.ones(8), np.repeat(np.exp(1.5 * rng.normal(size=28)), 2)])
    x, w = (rng.normal(size=(300, 64)) * sizes).astype(np.float32), rng.normal(size=(64, 6)).astype(np.float32)
    tied = np.where(np.arange(64) < 8, -1, (np.arange(64) - 8) // 2)
    factor, each, _ = scaled_by(strategy, x, w, tied, 28)
    pooled = np.abs(x[:, 8:]).mean(0).reshape(28, 2).mean(1)
    np.testing.assert_allclose(factor, pooled**0.3, rtol=1e-4)
    np.testing.assert_array_equal(each, np.concatenate([np.ones(8), np.repeat(factor, 2)]))


def nothing(w, moments, spec):
    return jnp.full(len(w), jnp.nan)


def test_a_strategy_without_an_answer_shows_in_the_error():
    assert np.isnan(scaled_by(nothing, *problem(), np.arange(64), 64)[-1])


SPECS = [QuantSpec(3, 32, symmetric=True), QuantSpec(4, -1), QuantSpec(4, 32), QuantSpec(8, 32)]


@ft.partial(quick_jit, static_argnames=("spec", "clip", "rounding"))
def solved(x, w, spec, clip, rounding):
    return solve(w, of(x, None), spec=spec, clip=clip, rounding=rounding)


def stored(found):
    """The weight (i, o) that is stored, with its padding."""
    steps, zeros = (np.asarray(a)[:, None] for a in (found.steps, found.zeros))
    return ((np.asarray(found.codes) - zeros) * steps).reshape(-1, steps.shape[-1])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_solution_is_a_quantized_weight_with_the_error_it_says(spec):
    x, w = problem(80)
    found = solved(x, w, spec, Clip(), Feedback())
    codes = np.asarray(found.codes)
    assert ((codes >= 0) & (codes <= spec.levels) & (codes == np.round(codes))).all()
    assert (np.asarray(found.steps) == np.asarray(found.steps).astype(np.float16)).all()
    if spec.symmetric:
        assert (np.asarray(found.zeros) == spec.middle).all()
    np.testing.assert_allclose(found.error, reference.output_errors(x, stored(found)[:80] - w), rtol=1e-2)
    nearest = reference.nearest(w, spec)
    np.testing.assert_allclose(found.nearest_error, reference.output_errors(x, nearest - w), rtol=1e-2)
    np.testing.assert_allclose(found.energy, reference.output_errors(x, w), rtol=1e-4)
    assert found.error.sum() < 0.8 * found.nearest_error.sum()


def test_columns_are_solved_apart():
    x, w = problem(80)
    run = lambda w: solved(x, w, G32, Clip(), Feedback())
    before, after = run(w), run(np.concatenate([w[:, :3], 5 * w[:, 3:] ** 2], 1))
    np.testing.assert_array_equal(before.codes[..., :3], after.codes[..., :3])
    np.testing.assert_array_equal(before.steps[:, :3], after.steps[:, :3])
    assert (before.codes[..., 3:] != after.codes[..., 3:]).any()


def test_columns_in_parts_are_what_they_are_at_once(monkeypatch):
    x, w = problem(64, 13)
    monkeypatch.setattr(sys.modules["awq_jax.search.solve"], "WORKING", 64 * 5)
    widths = []

    def rounded(w):
        widths.append(w.shape[1])
        return solve(w, of(x, None), spec=G32, clip=no_clip, rounding=to_nearest)

    for found, expected in zip(by_columns(rounded, jnp.asarray(w)), rounded(w), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert widths == [5, 13]


def test_strategies_run_under_vmap():
    x, w = problem(80)
    many = np.stack([w, 2 * w[::-1]])
    found = quick_jit(jax.vmap(lambda w: solve(w, of(x, None), spec=G32, clip=Clip(), rounding=Feedback())))(many)
    for k in range(2):
        np.testing.assert_allclose(found.error[k], solved(x, many[k], G32, Clip(), Feedback()).error, rtol=1e-2)


def test_without_clip_and_feedback_it_is_rounding_to_nearest():
    x, w = problem()
    found = solved(x, w, G32, no_clip, to_nearest)
    np.testing.assert_allclose(stored(found), reference.nearest(w, G32), rtol=1e-6)
    np.testing.assert_array_equal(found.error, found.nearest_error)


def above_zero(w, moments, spec):
    return jnp.full((2, 6), 0.1), jnp.full((2, 6), 0.2)


def test_zero_is_in_the_range_whatever_a_clip_says():
    x, w = problem()
    # The first weight of each group is out of the range and hardly matters.
    x[:, ::32] *= 1e-3
    w = np.random.default_rng(0).uniform(0, 0.2, w.shape).astype(np.float32)
    w[::32] = 0.4
    found = solved(x, w, G32, above_zero, to_nearest)
    np.testing.assert_array_equal(found.zeros, 0)
    np.testing.assert_allclose(found.steps, 0.2 / 15, rtol=1e-3)

"""The clip search against trying every range of every group on the activations."""

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import quick_jit
from reference import problem

from awq_jax.search import Clip, no_clip
from awq_jax.search.moments import of
from awq_jax.weights.spec import QuantSpec

RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
SPECS = [QuantSpec(4, 32), QuantSpec(3, 32, symmetric=True), QuantSpec(4, -1)]


@quick_jit
def clipped(w, x):
    return [Clip(RATIOS)(w, of(x, None), spec) for spec in SPECS]


def group_errors(x, w, low, high, spec):
    """Mean squared output error (groups, o) that rounding within the ranges causes, each group's on its own."""
    return np.stack(
        [
            reference.output_errors(x[:, rows], reference.rounded(w[rows], low[k], high[k], spec) - w[rows])
            for k, rows in enumerate(reference.groups(w, spec))
        ]
    )


def whole_ranges(w, spec):
    return tuple(map(np.stack, zip(*(reference.ranges(w[rows]) for rows in reference.groups(w, spec)), strict=True)))


def mirrored_range(low, high, ratio):
    widest = np.maximum(-low, high) * ratio
    return np.maximum(low, -widest), np.minimum(high, widest)


@pytest.mark.parametrize("k", range(len(SPECS)), ids=lambda k: str(SPECS[k]))
def test_each_group_gets_the_ratio_with_the_least_error(k):
    x, w = problem(96)
    spec = SPECS[k]
    low, high = whole_ranges(w, spec)
    errors = np.stack([group_errors(x, w, low * r, high * r, spec) for r in RATIOS])
    found = clipped(w, x)[k]
    np.testing.assert_allclose(group_errors(x, w, *map(np.asarray, found), spec), errors.min(0), rtol=1e-3)
    ratio = np.asarray(found[1]) / high
    assert (ratio < 0.95).any()
    assert np.isclose(ratio[..., None], RATIOS, atol=1e-4).any(-1).all()


def test_mirrored_ranges_shrink_from_the_widest_end():
    x, w = problem(64)
    w, spec = np.maximum(w, -0.4 * w.max(0)), SPECS[0]
    low, high = whole_ranges(w, spec)
    errors = np.stack([group_errors(x, w, *mirrored_range(low, high, r), spec) for r in RATIOS])
    found = tuple(map(np.asarray, quick_jit(lambda w: Clip(RATIOS, mirrored=True)(w, of(x, None), spec))(w)))
    np.testing.assert_allclose(group_errors(x, w, *found, spec), errors.min(0), rtol=1e-3)


def test_ends_may_be_clipped_apart():
    x, w = problem(64)
    spec = SPECS[0]
    w[::16] = np.abs(w).max() * 2
    found = quick_jit(lambda w: [Clip(RATIOS, ends=ends)(w, of(x, None), spec) for ends in (False, True)])(w)
    errors = [group_errors(x, w, *map(np.asarray, ranges), spec) for ranges in found]
    assert (errors[1] <= errors[0] * (1 + 1e-4)).all()
    assert errors[1].sum() < 0.95 * errors[0].sum()


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), shift=st.sampled_from([-1.0, 0.0, 1.0]))
def test_clipping_never_hurts_and_zero_stays_in_the_range(seed, shift):
    x, w = problem(96, seed=seed)
    w = w + np.float32(shift)
    for spec, (low, high) in zip(SPECS, clipped(w, x), strict=True):
        assert (low <= 0).all()
        assert (high >= 0).all()
        before = group_errors(x, w, *whole_ranges(w, spec), spec)
        assert (group_errors(x, w, np.asarray(low), np.asarray(high), spec) <= before * (1 + 1e-3) + 1e-9).all()


def test_without_clip_a_group_keeps_its_range():
    x, w = problem(80)
    for found, expected in zip(no_clip(w, of(x, None), SPECS[0]), whole_ranges(w, SPECS[0]), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_where_no_token_came_nothing_is_clipped():
    x, w = problem(96)
    for spec, found in zip(SPECS, clipped(w, 0 * x), strict=True):
        for a, b in zip(found, whole_ranges(w, spec), strict=True):
            np.testing.assert_array_equal(a, b)

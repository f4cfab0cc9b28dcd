"""Every strategy that comes along, tried by the kit that users have; and the kit, tried by broken strategies."""

import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick_compilation

from awq_jax.search import (
    Clip,
    Feedback,
    FeedbackGrid,
    Golden,
    Gradient,
    Grid,
    Importance,
    Joint,
    LearnedClip,
    Signed,
    no_clip,
    solve,
    to_nearest,
)
from awq_jax.search import testing as kit
from awq_jax.search.loss import group_blocks, group_error, output_error
from awq_jax.search.moments import of
from awq_jax.search.scale.grid import scale_error
from awq_jax.weights.tensor import affine, group, group_ranges, nearest, round_trip

SCALES = {
    "grid": Grid(),
    "both": Grid(duo="both"),
    "any": Grid(tuple(k / 5 for k in range(6)), duo="any"),
    "rms": Grid(statistic="rms"),
    "golden": Golden(),
    "gradient": Gradient(iterations=20),
    "joint": Joint(),
    "feedback": FeedbackGrid(),
}
CLIPS = {
    "none": no_clip,
    "clip": Clip(),
    "mirrored": Clip(mirrored=True),
    "ends": Clip(ends=True),
    "importance": Importance(),
    "learned": LearnedClip(iterations=20),
}
ROUNDINGS = {"nearest": to_nearest, "feedback": Feedback(), "signed": Signed(iterations=40)}


@pytest.fixture(autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.mark.parametrize("name", SCALES)
def test_scale_strategies(name):
    kit.check_scale(SCALES[name])


@pytest.mark.parametrize("name", CLIPS)
def test_clip_strategies(name):
    kit.check_clip(CLIPS[name])


@pytest.mark.parametrize("name", ROUNDINGS)
def test_rounding_strategies(name):
    kit.check_rounding(ROUNDINGS[name])


def usual(spec=kit.SPECS[0]):
    _, w, m, _ = next(iter(kit.problems(spec)))
    return w, m, spec


def test_golden_section_is_as_good_as_a_fine_grid():
    w, m, spec = usual()
    fine = min(float(scale_error(w, s, m, spec)) for s in Grid(tuple(k / 40 for k in range(41))).candidates(w, m, spec))
    assert float(scale_error(w, Golden()(w, m, spec), m, spec)) < 1.03 * fine


def test_gradients_better_the_grid():
    w, m, spec = usual()
    grid, found = (float(scale_error(w, f(w, m, spec), m, spec)) for f in (Grid(), Gradient(iterations=60, columns=0)))
    assert found < 0.97 * grid


def test_two_exponents_are_no_worse_than_one():
    w, m, spec = usual()
    ratios = tuple(k / 5 for k in range(6))
    one, two = (float(scale_error(w, Grid(ratios, duo=duo)(w, m, spec), m, spec)) for duo in ("never", "any"))
    assert two <= one * (1 + 1e-4)


def test_the_root_mean_square_is_the_statistic():
    w, _, spec = usual()
    x = np.random.default_rng(0).normal(size=(50, 128)).astype("f4")
    found = Grid((1.0,), statistic="rms").candidates(w, of(jnp.asarray(x), 32), spec)[0]
    expected = np.sqrt((x**2).mean(0))
    np.testing.assert_allclose(found, expected / np.sqrt(expected.max() * expected.min()), rtol=1e-4)


def clip_error(ranges, w, m, spec):
    grouped = group(w, spec)
    return float(group_error(round_trip(grouped, *ranges, spec) - grouped, group_blocks(m, spec)).sum())


def test_learned_ranges_better_the_clip_search():
    w, m, spec = usual()
    start, found = (clip_error(f(w, m, spec), w, m, spec) for f in (Clip(), LearnedClip()))
    assert found < 0.98 * start


def test_important_weights_are_kept():
    w, m, spec = usual()
    importance = np.asarray(m.mean_gram[0]).diagonal()
    errors = []
    for low, high in (group_ranges(w, spec), Importance()(w, m, spec)):
        rounded = round_trip(group(w, spec), low, high, spec).reshape(w.shape)
        errors.append(float((importance[:, None] * (rounded - w) ** 2).sum()))
    assert errors[1] < 0.9 * errors[0]


def test_signed_gradients_better_rounding_to_nearest():
    w, m, spec = usual()
    low, high = group_ranges(w, spec)
    errors = []
    for strategy in (to_nearest, Signed(iterations=200, shrink=0)):
        codes, steps, zeros = strategy(w, low, high, m, spec)
        errors.append(float(output_error(((codes - zeros[:, None]) * steps[:, None]).reshape(w.shape) - w, m).sum()))
    assert errors[1] < 0.8 * errors[0]


def shifted(w, low, high, m, spec):
    steps, zeros = affine(low, high, spec)
    return nearest(group(w, spec), steps, zeros, spec) + 0.5, steps, zeros


def of_all_columns(w, m, spec):
    low, high = group_ranges(w, spec)
    return jnp.broadcast_to(low.min(), low.shape), jnp.broadcast_to(high.max(), high.shape)


BROKEN = {
    "negative": (kit.check_scale, lambda w, m, spec: -jnp.ones(len(w)), "not positive"),
    "of another length": (kit.check_scale, lambda w, m, spec: jnp.ones(len(w) + 1), "shape|broadcast|incompatible"),
    "divides by a dead channel": (kit.check_scale, lambda w, m, spec: 1 / m.mean_abs, "not finite"),
    "too wide": (kit.check_clip, lambda w, m, spec: tuple(9 * a for a in group_ranges(w, spec)), "too wide"),
    "of all columns": (kit.check_clip, of_all_columns, "depends on the other columns|too wide"),
    "halves": (kit.check_rounding, shifted, "not whole"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_kit_finds_what_is_broken(name):
    check, strategy, message = BROKEN[name]
    with pytest.raises((AssertionError, ValueError, TypeError), match=message):
        check(strategy)


def one_off(w, low, high, m, spec):
    codes, steps, zeros = to_nearest(w, low, high, m, spec)
    return jnp.clip(codes + 1, 0, spec.levels), steps, zeros


def test_columns_that_end_worse_are_rounded_to_nearest():
    w, m, spec = usual()
    found = solve(w, m, spec=spec, clip=no_clip, rounding=one_off)
    codes, steps, _ = to_nearest(w, *group_ranges(w, spec), m, spec)
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.steps, steps)
    np.testing.assert_array_equal(found.error, found.nearest_error)

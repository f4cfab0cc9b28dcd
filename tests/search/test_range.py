"""Weights and activations of any size are quantized alike, and where a format cannot hold them the report says so."""

import dataclasses
import functools as ft

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import quick_compilation
from reference import problem

from awq_jax import PRESETS, QuantSpec, Recipe, calibrate, dot, quantize
from awq_jax.kernels import unpack
from awq_jax.pipeline.distill_decoder import together
from awq_jax.search.moments import of
from awq_jax.transforms.distill import stored_like
from awq_jax.transforms.mixed_bits import relative_error
from awq_jax.transforms.quantize import FAINT, relative
from awq_jax.weights.tensor import half_step, round_to_nearest, rounded_step, step_dtype

RECIPES = {"nearest": dataclasses.replace(PRESETS["rtn"], group_size=32), "default": Recipe(group_size=32)}
HALF = {name: dataclasses.replace(recipe, scales="none") for name, recipe in RECIPES.items()}


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compilation():
        yield


@ft.cache
def calibration():
    x, w = problem(64)
    return calibrate(lambda p, x: x @ p, w, [(x,)], block=None)


def solved(w, x, recipe):
    """The QuantizedTensor, its codes, and the report of one site that reads x."""
    seen = dataclasses.replace(calibration(), moments={"": of(jnp.asarray(x, jnp.float32), None)})
    q, (report,) = quantize(jnp.asarray(w, jnp.float32), seen, recipe)
    return q, np.asarray(unpack(q.codes, q.spec.bits)), report


@ft.cache
def usual(name):
    x, w = problem(64)
    return x, w, *solved(w, x, RECIPES[name])


def column_errors(q, w):
    w = np.asarray(w, np.float64)
    return np.square(np.asarray(q.dequantize(), np.float64) - w).sum(0) / np.square(w).sum(0)


powers = st.integers(-66, 26)
"""Of two: 1e-20 to 1e8."""


def test_outputs_that_float32_cannot_square_are_told():
    x, w = problem(64)
    _, _, report = solved(w, x * 1e-30, RECIPES["nearest"])
    assert (report.error, report.note) == (0, FAINT)
    assert not solved(0 * w, x, RECIPES["nearest"])[2].note


@pytest.mark.parametrize("name", RECIPES)
def test_powers_of_two_change_no_code_and_no_error(name):
    x, w, q, codes, report = usual(name)

    @settings(max_examples=15)
    @given(a=powers, b=powers)
    def alike(a, b):
        small, found, told = solved(np.ldexp(w, a), np.ldexp(x, b), RECIPES[name])
        np.testing.assert_array_equal(found, codes)
        np.testing.assert_array_equal(np.ldexp(np.float64(small.scales), -a), np.float64(q.scales))
        np.testing.assert_array_equal(small.input_scale, q.input_scale)
        assert told == report

    alike()


@pytest.mark.parametrize(("name", "same", "near"), [("nearest", 0.99, 0.01), ("default", 0.9, 0.05)])
def test_other_factors_change_what_ties_decide(name, same, near):
    x, w, _, codes, report = usual(name)
    sizes = st.floats(-20, 8).map(lambda k: np.float32(10**k))

    @settings(max_examples=15)
    @given(a=sizes, b=sizes)
    def alike(a, b):
        _, found, told = solved(w * a, x * b, RECIPES[name])
        assert (found == codes).mean() >= same
        assert told.error == pytest.approx(report.error, rel=near)
        assert told.nearest_error == pytest.approx(report.nearest_error, rel=0.01)

    alike()


def test_columns_of_very_different_sizes_lose_alike():
    x, w, q, codes, _ = usual("nearest")
    powers = np.array([0, -13, -40, -66, 20, 3])
    mixed, found, _ = solved(np.ldexp(w, powers), x, RECIPES["nearest"])
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_allclose(column_errors(mixed, np.ldexp(w, powers)), column_errors(q, w), rtol=1e-5)
    y = np.asarray(dot(jnp.asarray(x), mixed), np.float64)
    np.testing.assert_allclose(np.ldexp(y, -powers), dot(jnp.asarray(x), q), rtol=1e-3, atol=1e-3)


def test_steps_take_four_bytes_only_where_two_do_not_hold_them():
    x, w, q, _, report = usual("nearest")
    assert q.scales.dtype == np.float16
    assert report.note == ""
    for size, dtype in ((1e-2, np.float16), (1e-4, np.float32), (1e5, np.float16), (1e6, np.float32)):
        assert solved(w * np.float32(size), x, RECIPES["nearest"])[0].scales.dtype == dtype
    w = np.where(np.arange(64)[:, None] < 32, 0, w)
    assert solved(w, x, RECIPES["nearest"])[0].scales.dtype == np.float16
    assert step_dtype(2.0**-14, 65504.0) == np.float16
    assert step_dtype(2.0**-15, 1.0) == step_dtype(1.0, 65536.0) == np.float32


@given(a=st.floats(1e-30, 1e30))
def test_steps_have_the_bits_that_float16_has(a):
    found = float(rounded_step(jnp.float32(a)))
    fraction, exponent = np.frexp(np.float32(a))
    assert found == np.ldexp(float(np.float16(fraction)), exponent)
    half = float(np.clip(np.float32(a), 2.0**-24, 65504).astype(np.float16))
    if half < min(np.float32(a), 2.0**-14):
        half += 2.0**-24
    assert float(half_step(jnp.float32(a))) == half


@pytest.mark.parametrize("name", HALF)
def test_without_input_scales_steps_are_subnormal_numbers_of_float16(name):
    x, w, *_ = usual(name)
    _, _, report = solved(w, x, HALF[name])
    for size in (1e-3, 1e-4, 1e-5):
        q, _, told = solved(w * np.float32(size), x, HALF[name])
        assert q.scales.dtype == np.float16
        assert told.error < (1.2 if size > 1e-5 else 1.6) * report.error
        assert told.note == ""
        expected = x.astype(np.float64) @ np.asarray(q.dequantize(), np.float64)
        np.testing.assert_allclose(dot(jnp.asarray(x), q), expected, rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize(("size", "bound"), [(1e-9, "steps of 6e-08, the smallest"), (1e8, "steps of 65504, the larg")])
def test_what_float16_cannot_hold_is_told(name, size, bound):
    x, w, *_ = usual(name)
    q, _, report = solved(w * np.float32(size), x, HALF[name])
    assert report.error > 0.5
    assert report.note.startswith(bound)
    assert f"loses {report.error:.0%} of its output" in report.note
    exact = np.square(x @ (np.asarray(q.dequantize()) / np.float32(size) - w)).sum() / np.square(x @ w).sum()
    assert report.error == pytest.approx(exact, rel=1e-3)


def test_a_site_that_loses_much_says_so():
    x, w, *_ = usual("nearest")
    _, _, report = solved(w, x, dataclasses.replace(RECIPES["nearest"], bits=2))
    assert report.error > 0.2
    assert report.note.startswith(f"loses {report.error:.0%}")


@pytest.mark.parametrize("name", RECIPES)
def test_a_site_that_saw_only_zeros_is_rounded_by_its_weights(name):
    x, w, *_ = usual(name)
    q, _, report = solved(w, 0 * x, RECIPES[name])
    assert report.note == "1 of 1 reached by no token but zeros: rounded by their weights alone"
    np.testing.assert_array_equal(q.input_scale, 1)
    assert np.isfinite(q.dequantize()).all()
    assert column_errors(q, w).max() < 0.02


def test_an_output_without_energy_that_has_an_error_is_lost():
    assert relative(3.0, 1.0, 4.0) == (0.75, 0.25)
    assert relative(0.0, 1e-9, 0.0) == (0.0, 1.0)
    assert relative(1e-9, 0.0, -1e-12) == (1.0, 0.0)


def test_the_change_of_tiny_outputs_is_relative_too():
    y, exact = np.array([[[1, 2], [0, 0]], [[1, 1], [0, 0]]], np.float32)
    for size in np.array([1, 1e-25, 1e25], np.float32):
        assert float(relative_error(y * size, exact * size)) == pytest.approx(0.25)


def test_trained_steps_keep_their_dtype():
    w = round_to_nearest(jnp.asarray(problem(64)[1]), QuantSpec(4, 32))
    tiny = dataclasses.replace(w, scales=w.scales.astype(jnp.float32) * 1e-9)
    for before in (w, tiny):
        trained = dataclasses.replace(before, scales=before.scales.astype(jnp.float32) * 1.001)
        found = stored_like(before, trained)
        assert found.scales.dtype == before.scales.dtype
        np.testing.assert_allclose(np.float64(found.scales), np.float64(trained.scales), rtol=2**-11)
    assert isinstance(together([{"w": w}, {"w": tiny}]), list)
    assert isinstance(together([{"w": w}, {"w": w}]), dict)

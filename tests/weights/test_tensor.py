"""What quantize stores, against numpy, and what dot and Layout make of it."""

import dataclasses

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from awq_jax.kernels import unpack
from awq_jax.kernels.arithmetic import dequantized, ungrouped
from awq_jax.weights.layout import layout_of_json
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import assemble, dot, group, round_to_nearest, with_input_scale

FLOAT16_ROUNDING = 2.0**-11


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def stored(q):
    """The unpacked codes, the steps and the zero points of `q`, the last two repeated down their groups."""
    codes = np.asarray(unpack(q.codes, q.spec.bits))[..., : q.in_features, :].astype(np.float64)
    group = q.spec.group(q.in_features)
    zeros = np.full(q.scales.shape, q.spec.middle) if q.zeros is None else np.asarray(q.zeros)
    rows = [np.repeat(np.asarray(a, np.float64), group, axis=-2)[..., : q.in_features, :] for a in (q.scales, zeros)]
    return codes, *rows


def expected_steps_and_zeros(w: np.ndarray, bits: int, group: int, symmetric: bool):
    steps, zeros = [], []
    for start in range(0, len(w), group):
        rows = w[start : start + group].astype(np.float64)
        low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
        if symmetric:
            step = np.maximum(high / (2 ** (bits - 1) - 1), -low / 2 ** (bits - 1))
            zero = np.full_like(step, 2 ** (bits - 1))
        else:
            step = (high - low) / (2**bits - 1)
            zero = np.round(-low / step)
        steps.append(step)
        zeros.append(zero)
    return np.stack(steps), np.stack(zeros)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_quantize_agrees_with_numpy(bits, symmetric, group_size):
    in_features = 200
    w = normal(in_features, 24) + np.linspace(-2, 2, 24, dtype=np.float32)
    spec = QuantSpec(bits, group_size, symmetric)
    q = round_to_nearest(w, spec)

    group = 224 if group_size == -1 else group_size
    groups = -(-in_features // group)
    assert q.shape == w.shape
    assert q.pad == groups * group - in_features
    assert q.codes.shape == (groups * group * bits // 32, 24)
    assert (q.scales.dtype, q.scales.shape) == (np.float16, (groups, 24))
    assert (q.zeros is None) == symmetric

    steps, zeros = expected_steps_and_zeros(w, bits, group, symmetric)
    np.testing.assert_allclose(q.scales, steps, rtol=1.01 * FLOAT16_ROUNDING)
    if not symmetric:
        np.testing.assert_array_equal(q.zeros, zeros)

    codes, step, zero = stored(q)
    nearest = np.round(w / step.astype(np.float32)) + zero
    np.testing.assert_array_equal(codes, np.clip(nearest, 0, 2**bits - 1))
    np.testing.assert_allclose(q.dequantize(), (codes - zero) * step, rtol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
@given(w=hnp.arrays(np.float32, (96, 2), elements=st.floats(-1e4, 1e4, width=32)))
def test_error_is_at_most_half_a_step(bits, symmetric, w):
    q = round_to_nearest(w, QuantSpec(bits, 64, symmetric))
    _, step, _ = stored(q)
    rounding_of_the_step = 2**bits * FLOAT16_ROUNDING
    assert np.all(np.abs(q.dequantize() - w) <= step * (0.5 + rounding_of_the_step))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_group_of_one_sign_keeps_its_weights_apart(sign, symmetric):
    w = sign * np.linspace(5, 6, 32, dtype=np.float32)[:, None]
    q = round_to_nearest(w, QuantSpec(8, 32, symmetric))
    _, step, _ = stored(q)
    assert np.all(np.abs(q.dequantize() - w) <= 0.6 * step)
    assert step.max() <= 6 / 126
    assert len(np.unique(q.dequantize())) >= 20


@pytest.mark.parametrize("size", [1e-20, 1e-9, 1e-4, 1.0, 1e8])
def test_weights_of_any_size_are_held(size):
    usual, spec = normal(64, 8), QuantSpec(4, 32)
    error = lambda q: np.square(np.asarray(q.dequantize(), np.float64) / size - usual).sum() / np.square(usual).sum()
    w = (usual * size).astype(np.float32)
    traced = jax.jit(round_to_nearest, static_argnums=1)(w, spec)
    q, half = round_to_nearest(w, spec), round_to_nearest(w, spec, steps=np.float16)
    assert max(error(q), error(traced)) < 0.02
    assert (q.scales.dtype, half.scales.dtype) == (np.float16 if size == 1 else np.float32, np.float16)
    assert traced.scales.dtype == np.float32


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("constant", [0.0, 1.0, -1.0, 1e-7, -1e-30, 3e4])
def test_zero_constant_and_dead_columns_are_finite(constant, symmetric):
    w = normal(64, 3)
    w[:, 1], w[:32, 2] = constant, constant
    q = round_to_nearest(w, QuantSpec(4, 32, symmetric))
    assert np.isfinite(q.scales).all()
    assert (np.asarray(q.scales) > 0).all()
    back = np.asarray(q.dequantize())
    _, step, _ = stored(q)
    assert np.all(np.abs(back - w) <= 0.51 * step)
    if constant == 0:
        np.testing.assert_array_equal(back[:, 1], 0)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_half_precision_weights_are_quantized_in_float32(bits, dtype):
    w = jnp.asarray(normal(64, 8), dtype)
    q = round_to_nearest(w, QuantSpec(bits, 32))
    wide = round_to_nearest(w.astype(jnp.float32), QuantSpec(bits, 32))
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(q, dtype=wide.dtype), wide)
    assert q.dequantize().dtype == dtype


def test_leading_axes_are_quantized_apart():
    w, spec = normal(2, 3, 96, 4), QuantSpec(4, 64)
    each = round_to_nearest(w[1, 2], spec)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a: a[1, 2], round_to_nearest(w, spec)), each)


SPEC = QuantSpec(4, 64)
INPUT_SCALE, EXPERT_INPUT_SCALE = np.exp(normal(100, seed=2)), np.exp(normal(3, 100, seed=2))
W, EXPERTS = normal(100, 24), normal(3, 100, 24)
X, EXPERT_X = normal(2, 5, 100, seed=1), normal(3, 5, 100, seed=1)

CASES = {
    "dense": lambda: (X, W),
    "dense experts": lambda: (EXPERT_X, EXPERTS),
    "quantized": lambda: (X, round_to_nearest(W, SPEC)),
    "one row": lambda: (X[0, 0], round_to_nearest(W, SPEC)),
    "symmetric": lambda: (X, round_to_nearest(W, QuantSpec(3, -1, symmetric=True))),
    "input scale": lambda: (X, with_input_scale(round_to_nearest(W, SPEC), INPUT_SCALE)),
    "experts": lambda: (EXPERT_X, round_to_nearest(EXPERTS, SPEC)),
    "experts, more axes": lambda: (EXPERT_X[:, None], round_to_nearest(EXPERTS, SPEC)),
    "experts, input scale": lambda: (EXPERT_X, with_input_scale(round_to_nearest(EXPERTS, SPEC), EXPERT_INPUT_SCALE)),
}


@pytest.fixture(params=CASES)
def case(request):
    """An activation and a weight that dot takes."""
    return CASES[request.param]()


def dense_product(x, w):
    """x @ w in numpy, w's leading axes aligned with x's."""
    dense = np.asarray(w if isinstance(w, np.ndarray) else w.dequantize())
    lead = dense.ndim - 2
    return x @ dense.reshape(*dense.shape[:lead], *[1] * (x.ndim - lead - 2), *dense.shape[lead:])


def test_dot_is_the_matmul_with_the_dense_weight(case):
    x, w = case
    np.testing.assert_allclose(dot(x, w), dense_product(x, w), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_dot_keeps_the_dtype_of_x(case, dtype):
    x, w = case
    half = jnp.asarray(x, dtype)
    y = dot(half, jnp.asarray(w, dtype) if isinstance(w, np.ndarray) else w)
    assert y.dtype == dtype
    exact = dense_product(np.asarray(half, np.float32), w)
    assert np.abs(np.asarray(y, np.float32) - exact).max() <= 4 * jnp.finfo(dtype).eps * np.abs(exact).max()


def test_grad_of_dot_with_respect_to_x(case):
    x, w = case
    weighting = normal(*dense_product(x, w).shape, seed=3)
    grad = jax.grad(lambda x: (dot(x, w) * weighting).sum())(x)
    dense = w if isinstance(w, np.ndarray) else np.asarray(w.dequantize())
    np.testing.assert_allclose(grad, dense_product(weighting, dense.swapaxes(-1, -2)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["dense", "quantized"])
def test_the_shape_error_names_both_sizes(name):
    _, w = CASES[name]()
    with pytest.raises((ValueError, TypeError)) as error:
        dot(normal(2, 96), w)
    assert "96" in str(error.value)
    assert "100" in str(error.value)


LAYOUTS = {
    "as stored": (layout_of_json((4, 6), (4, 6), (0, 1), 0, 1), lambda w: w),
    "transposed": (layout_of_json((6, 4), (6, 4), (1, 0), 0, 1), lambda w: w.swapaxes(-1, -2)),
    "heads out": (layout_of_json((4, 2, 3), (4, 2, 3), (0, 1, 2), 0, 1), lambda w: w.reshape(*w.shape[:-2], 6)),
    "heads in": (layout_of_json((2, 3, 4), (2, 3, 4), (0, 1, 2), 0, 2), lambda w: w.reshape(*w.shape[:-3], 6, 4)),
    "heads out, transposed": (
        layout_of_json((2, 3, 4), (2, 3, 4), (2, 0, 1), 0, 1),
        lambda w: np.moveaxis(w, -1, -3).reshape(*w.shape[:-3], 4, 6),
    ),
    "experts": (layout_of_json((5, 4, 6), (5, 4, 6), (0, 1, 2), 1, 1), lambda w: w),
    "experts last": (layout_of_json((4, 6, 5), (4, 6, 5), (2, 0, 1), 1, 1), lambda w: np.moveaxis(w, -1, -3)),
    "split by a reshape": (
        layout_of_json((4, 10), (4, 2, 5), (1, 0, 2), 1, 1),
        lambda w: w.reshape(*w.shape[:-1], 2, 5).swapaxes(-3, -2),
    ),
}


@pytest.mark.parametrize("stack", [(), (7,)], ids=["one layer", "stacked"])
@pytest.mark.parametrize(("layout", "matrix"), list(LAYOUTS.values()), ids=list(LAYOUTS))
def test_layout_reads_the_param_as_matrices_and_gives_it_back(layout, matrix, stack):
    w = np.arange(np.prod(stack + layout.shape)).reshape(stack + layout.shape)
    np.testing.assert_array_equal(layout.apply(w), matrix(w))
    np.testing.assert_array_equal(layout.undo(layout.apply(w)), w)


def test_only_the_layout_of_a_stored_matrix_is_one():
    named = {name for name, (layout, _) in LAYOUTS.items() if layout.is_matrix}
    assert named == {"as stored", "experts"}


@pytest.mark.parametrize("stack", [(), (7,)], ids=["one layer", "stacked"])
@pytest.mark.parametrize(("layout", "matrix"), list(LAYOUTS.values()), ids=list(LAYOUTS))
def test_a_quantized_param_has_the_shape_and_order_of_the_dense_one(layout, matrix, stack):
    w = np.random.default_rng(0).integers(-8, 8, size=stack + layout.shape).astype(np.float32)
    as_matrices = matrix(w)
    in_features = as_matrices.shape[-2]
    padding = [(0, 0)] * (as_matrices.ndim - 2) + [(0, 32 - in_features), (0, 0)]
    codes = np.pad(as_matrices + 8, padding)[..., None, :, :]
    ones = np.ones((*codes.shape[:-2], codes.shape[-1]), np.float32)
    q = assemble(codes, ones, 8 * ones, QuantSpec(4, 32), in_features=in_features, dtype=np.float32, layout=layout)
    assert (q.shape, q.ndim, q.matrix_shape) == (w.shape, w.ndim, as_matrices.shape)
    np.testing.assert_array_equal(q.dequantize(), w)


@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_codes_are_made_weights_alike_by_group_and_by_weight(lead):
    codes = np.random.default_rng(0).integers(0, 16, (*lead, 3, 32, 5)).astype(np.float32)
    steps, zeros = np.exp(normal(*lead, 3, 5)), np.round(8 + normal(*lead, 3, 5, seed=1))
    of_each = [np.repeat(a[..., None, :], 32, -2) for a in (steps, zeros)]
    expected = (codes - of_each[1]) * of_each[0]
    np.testing.assert_array_equal(dequantized(codes, steps, zeros), expected)
    np.testing.assert_array_equal(dequantized(codes, *of_each), expected)
    np.testing.assert_array_equal(dequantized(codes, steps, 8), (codes - 8) * of_each[0])


def test_ungrouped_undoes_group():
    w = normal(2, 70, 3)
    np.testing.assert_array_equal(ungrouped(group(w, QuantSpec(4, 32)), 70), w)

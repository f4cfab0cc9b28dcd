"""Moments against numpy, and as what they are for: the output error of any change of the weight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from awq_jax.search.moments import UNIT, Moments, block_size, of, unit


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def expected(x, size, weights=None):
    """Count, sum of |x| and the Gram matrix's blocks of `size` of tokens x (t, i), in float64."""
    x = x.astype(np.float64)
    weights = np.ones(len(x)) if weights is None else weights
    gram = (x * weights[:, None]).T @ x
    pad = -len(gram) % size
    gram = np.pad(gram, ((0, pad), (0, pad)))
    blocks = [gram[k : k + size, k : k + size] for k in range(0, len(gram), size)]
    return Moments(weights.sum(), (np.abs(x) * weights[:, None]).sum(0), np.stack(blocks))


def check(found, wanted):
    found = dataclasses.replace(found, gram=found.gram / UNIT**2)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("features", "most", "size"),
    [(40, None, 40), (40, 64, 40), (40, 40, 40), (40, 32, 32), (576, 128, 128), (1536, 640, 512), (1000, 640, 512)],
)
def test_blocks_are_equal_and_cover_the_features(features, most, size):
    assert block_size(features, most) == size


@given(features=st.integers(1, 9000), most=st.none() | st.integers(1, 40).map(lambda k: 32 * k))
def test_no_block_is_larger_than_asked(features, most):
    size = block_size(features, most)
    assert size <= (most or features)
    blocks = -(-features // size)
    if most is not None:
        assert blocks <= -(-features // most) + (most % 128 != 0)
    assert size % 128 == 0 or size in (features, most)


@pytest.mark.parametrize("block", [None, 16, 32, 64])
@pytest.mark.parametrize("weighted", [False, True])
def test_moments_of_tokens(block, weighted):
    x = normal(2, 7, 40)
    weights = np.abs(normal(2, 7, seed=1)) if weighted else None
    flat = None if weights is None else weights.ravel()
    check(of(x, block, weights=weights), expected(x.reshape(14, 40), min(block or 40, 40), flat))


def test_experts_are_kept_apart():
    x, weights = normal(3, 2, 5, 8), np.abs(normal(2, 5, seed=1))
    each = [expected(e.reshape(10, 8), 8, weights.ravel()) for e in x]
    check(of(x, None, lead=1, weights=weights), jax.tree.map(lambda *a: np.stack(a), *each))


def test_half_precision_is_summed_in_float32():
    x = normal(4000, 8).astype(np.float16)
    check(of(x, None), expected(x, 8))


def test_a_mask_is_leaving_tokens_out():
    x, mask = normal(9, 8), np.arange(9) % 3 > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), of(x, 4, weights=mask), of(x[mask], 4))


@given(cut=st.integers(1, 8))
def test_moments_of_parts_add_up(cut):
    x = normal(9, 8)
    check(of(x[:cut], 4) + of(x[cut:], 4), expected(x, 4))


def test_means_are_per_token_and_zero_where_none_came():
    x = normal(9, 8)
    m = of(x, None)
    np.testing.assert_allclose(m.mean_abs, np.abs(x).mean(0), rtol=1e-5)
    np.testing.assert_allclose(m.mean_gram[0], x.T @ x / 9, rtol=1e-4, atol=1e-5)
    empty = of(x, None, weights=np.zeros(9))
    assert not empty.mean_abs.any()
    assert not empty.mean_gram.any()


@pytest.mark.parametrize("lead", [(), (3,)])
def test_scaled_moments_are_those_of_the_scaled_input(lead):
    x, factor = normal(*lead, 9, 40), np.exp(normal(*lead, 40, seed=1))
    wanted = of(x * factor[..., None, :], 16, len(lead))
    check(of(x, 16, len(lead)).scaled(factor), dataclasses.replace(wanted, gram=wanted.gram / UNIT**2))


def test_a_whole_gram_matrix_gives_the_error_of_any_change():
    x, change = normal(50, 12), normal(12, 4, seed=1)
    error = np.square(x @ change).mean(0)
    np.testing.assert_allclose(np.einsum("io,ij,jo->o", change, of(x, None).mean_gram[0], change), error, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [1e-20, 1e-8, 1e8])
def test_squares_are_held_whatever_the_size(size, dtype):
    x = jnp.asarray(normal(50, 12) * np.float32(size), dtype)
    exact = np.asarray(x, np.float64) / size
    np.testing.assert_allclose(of(x, None).gram[0] / size / size, exact.T @ exact * UNIT**2, rtol=2e-3, atol=1e10)


@given(a=st.floats(1e-37, 1e37))
def test_dividing_by_the_unit_rounds_nothing(a):
    found = float(unit(jnp.float32([0, -a])))
    assert np.frexp(found)[0] == 0.5
    assert 1 <= np.float32(a) / found < 2


def test_a_size_that_some_input_has_is_the_largest_where_few_are_large():
    x = normal(4000, 8)
    few = np.where(np.arange(4000)[:, None] == 7, 9e4, x).astype(np.float32)
    assert np.abs(x).max() / 4 < float(of(x, None).large) <= np.abs(x).max()
    assert 8.5e4 < float(of(few, 4).large) <= 9e4
    assert float(of(0 * x, None).large) == 0

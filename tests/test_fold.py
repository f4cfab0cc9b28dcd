"""Folding into params: against numpy, on the function, on the statistics; and what the check catches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick_jit
from rescaling import gauged, random_factors
from zoo import ZOO

from awq_jax import sites, with_moments
from awq_jax.fold import check_fold, fold
from awq_jax.sites import named_leaves

NAMES = ["llama_scanned", "gemma", "gpt2", "einsum_attention"]


def folded(name, factor=1.0):
    """The model, its trace, random factors of every fold, and the params with them."""
    model = ZOO[name]()
    traced, rng = sites(model.fn, model.params, *model.inputs), np.random.default_rng(0)
    factors = {k: factor * random_factors(f, traced, model.params, rng) for k, f in enumerate(traced.folds)}
    return model, traced, factors, fold(model.params, factors, traced.folds)


@pytest.mark.parametrize("name", NAMES)
def test_params_are_those_that_numpy_makes(name):
    model, traced, factors, params = folded(name)
    changes = [(member, factors[k]) for k, f in enumerate(traced.folds) for member in f.members]
    expected = named_leaves(gauged(model.params, changes))
    touched = {member.param for member, _ in changes}
    for path, found in named_leaves(params).items():
        assert found.dtype == expected[path].dtype
        np.testing.assert_allclose(np.float32(found), np.float32(expected[path]), rtol=1e-5, atol=1e-6)
        assert (path in touched) == bool((np.float32(found) != np.float32(named_leaves(model.params)[path])).any())


def test_no_factors_change_nothing():
    model, traced, _, _ = folded("llama_scanned")
    jax.tree.map(np.testing.assert_array_equal, fold(model.params, {}, traced.folds), model.params)


@pytest.mark.parametrize("name", ["llama_scanned", "gpt2"])
def test_the_check_tells_how_little_the_function_moved(name):
    model, _, _, params = folded(name, factor=1.3)
    moved = check_fold(model.fn, model.params, params, *model.inputs)
    run = quick_jit(model.fn)
    before, after = (np.asarray(run(p, *model.inputs)) for p in (model.params, params))
    assert moved < 1e-5
    assert moved == pytest.approx(np.abs(after - before).max() / np.abs(before).max(), abs=3e-6)


@pytest.mark.parametrize("site", ["layers/attn/k", "layers/attn/v", "layers/attn_norm", "norm"])
def test_a_member_that_was_missed_is_caught(site):
    model, _, _, params = folded("llama_scanned")
    leaves = named_leaves(params)
    leaves[site] = named_leaves(model.params)[site]
    wrong = jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))
    with pytest.raises(ValueError, match="more than rounding explains"):
        check_fold(model.fn, model.params, wrong, *model.inputs)


SMALL = {"norm": np.linspace(1, 2, 8, dtype=np.float32), "w": np.eye(8, dtype=np.float32)}
SCALED = {"norm": SMALL["norm"] / 4, "w": SMALL["w"] * 4}
X = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)


def apply(p, x):
    return (x * p["norm"]) @ p["w"]


def test_integer_outputs_are_not_compared():
    counted = lambda p, x: {"y": apply(p, x), "n": (p["w"] * 100).astype(jnp.int32)}
    assert check_fold(counted, SMALL, SCALED, X) < 1e-6
    assert (counted(SMALL, X)["n"] != counted(SCALED, X)["n"]).any()


def test_nan_is_no_agreement():
    with pytest.raises(ValueError, match="changed the function by nan"):
        check_fold(apply, SMALL, SCALED | {"w": SCALED["w"] * np.nan}, X)


def test_a_tolerance_may_be_given():
    wrong = SCALED | {"norm": SCALED["norm"] * 1.01}
    assert check_fold(apply, SMALL, wrong, X, tolerance=0.02) == pytest.approx(0.01, rel=0.1)
    with pytest.raises(ValueError, match=r"changed the function by 1\.0e-02"):
        check_fold(apply, SMALL, wrong, X)


@pytest.mark.parametrize(("dtype", "output"), [(jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float16)])
def test_half_precision_params_may_round_but_not_more(dtype, output):
    model, traced, factors, _ = folded("opt", factor=1.3)
    half = jax.tree.map(lambda w: jnp.asarray(w, dtype), model.params)
    fn = lambda p, *inputs: model.fn(p, *inputs).astype(output)
    params = fold(half, factors, traced.folds)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(params))
    assert 1e-4 < check_fold(fn, half, params, *model.inputs) < 0.1
    with pytest.raises(ValueError, match="more than rounding explains"):
        check_fold(fn, half, params | {"norm": half["norm"]}, *model.inputs)


@pytest.mark.parametrize("name", ["einsum_attention", "llama_scanned", "gpt2"])
def test_channels_are_numbered_as_the_moments_have_them(name):
    model, traced, factors, params = folded(name)
    observed = quick_jit(lambda p: with_moments(model.fn, traced, block=None)(p, *model.inputs)[1])
    before, after = observed(model.params), observed(params)
    for k, f in enumerate(traced.folds):
        every = np.concatenate([factors[k], np.ones((*factors[k].shape[:-1], 1), np.float32)], -1)
        for site in f.sites:
            group = traced.sites[site].group
            expected = before[group].scaled(1 / every[..., f.channels(site)])
            found = after[group]
            np.testing.assert_allclose(found.abs_sum, expected.abs_sum, rtol=1e-3)
            atol = 1e-4 * np.abs(expected.gram).max()
            np.testing.assert_allclose(found.gram, expected.gram, rtol=1e-3, atol=atol)

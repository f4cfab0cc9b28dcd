"""Folding into params: against numpy, on the function, on the statistics; and what the check catches."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick_jit
from rescaling import gauged, random_factors
from zoo import ZOO

from awq_jax import sites, with_moments
from awq_jax.transforms.folding import check_folds, fold, largest_change
from awq_jax.weights.paths import named_leaves

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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "einsum_attention"])
def test_folds_that_are_right_pass(name, dtype):
    model = ZOO[name]()
    params = jax.tree.map(lambda w: jnp.asarray(w, dtype), model.params)
    folds = sites(model.fn, params, *model.inputs).folds
    assert folds
    check_folds(model.fn, params, folds, *model.inputs)


CAUGHT = [
    ("llama_scanned", "layers/attn/k", jnp.float32),
    ("llama_scanned", "layers/attn/v", jnp.float32),
    ("llama_scanned", "layers/attn_norm", jnp.float32),
    ("llama_scanned", "norm", jnp.float32),
    ("llama", "layers/0/attn/k", jnp.bfloat16),
    ("llama", "layers/1/attn_norm", jnp.float16),
]


@pytest.mark.parametrize(("name", "missed", "dtype"), CAUGHT)
def test_a_member_that_was_missed_is_caught(name, missed, dtype):
    model = ZOO[name]()
    params = jax.tree.map(lambda w: jnp.asarray(w, dtype), model.params)
    folds = sites(model.fn, params, *model.inputs).folds
    wrong = tuple(replace(f, members=tuple(m for m in f.members if m.param != missed)) for f in folds)
    broken = [f for f, whole in zip(wrong, folds, strict=True) if len(f.members) != len(whole.members)]
    with pytest.raises(ValueError, match="more than rounding explains") as caught:
        check_folds(model.fn, params, wrong, *model.inputs)
    assert str(caught.value).startswith(", ".join(broken[0].sites) + ": folding")


BEFORE = {"y": jnp.array([1.0, -np.inf, 4.0, np.nan]), "n": jnp.arange(3), "h": jnp.array([2.0, 3.0], jnp.bfloat16)}


@pytest.mark.parametrize(
    ("after", "change"),
    [
        ({"y": [1.0, -np.inf, 4.0, np.nan]}, 0),
        ({"y": [1.5, -np.inf, 4.0, np.nan]}, 0.5 / 4),
        ({"y": [1.0, -np.inf, 4.5, np.nan], "n": [7, 8, 9], "h": [2.0, 0.0]}, 1),
        ({"y": [1.0, -np.inf, np.nan, np.nan]}, np.nan),
        ({"y": [1.0, np.inf, 4.0, np.nan]}, np.nan),
        ({"y": [1.0, 0.0, 4.0, np.nan]}, np.nan),
        ({"y": [1.0, -np.inf, 4.0, 0.0]}, np.nan),
    ],
)
def test_how_much_outputs_changed(after, change):
    after = BEFORE | {k: jnp.asarray(v, BEFORE[k].dtype) for k, v in after.items()}
    assert largest_change(BEFORE, after) == pytest.approx(change, nan_ok=True)


def test_masked_outputs_may_be_infinite():
    fn = lambda p, x: jnp.where(jnp.arange(8)[None] < 6, (x * p["norm"][None]) @ p["w"], -jnp.inf)
    params = {"norm": np.linspace(1, 2, 8, dtype=np.float32), "w": np.eye(8, dtype=np.float32)}
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    (found,) = sites(fn, params, x).folds
    check_folds(fn, params, (found,), x)
    with pytest.raises(ValueError, match="w: folding"):
        check_folds(fn, params, (replace(found, members=found.members[:1]),), x)


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

"""A QuantizedTensor that is taken for an array says what to do instead, whatever is done with it."""

import copy

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import awq_jax as awq
from awq_jax.weights.tensor import round_to_nearest

W = round_to_nearest(jax.random.normal(jax.random.key(0), (64, 64)), awq.QuantSpec(4, 32))
X = np.ones((3, 64), np.float32)
REMEDY = r"QuantizedTensor\(shape=\(64, 64\).* awq\.quantized\(apply_fn\).*w\.dequantize\(\)"

OPERATIONS = {
    "x @ w": lambda w: jnp.asarray(X) @ w,
    "numpy x @ w": lambda w: X @ w,
    "w @ x": lambda w: w @ X.T,
    "sum": lambda w: 1 + w,
    "in place": lambda w: w.__imul__(2),
    "negative": lambda w: -w,
    "comparison": lambda w: w < 1,
    "equality": lambda w: jnp.asarray(X) == w,
    "index": lambda w: w[0],
    "whole": lambda w: w[...],
    "length": len,
    "iteration": list,
    "membership": lambda w: 1 in w,
    "truth": bool,
    "float": float,
    "astype": lambda w: w.astype(jnp.bfloat16),
    "T": lambda w: w.T,
    "at": lambda w: w.at[0].set(1),
    "jnp.asarray": jnp.asarray,
    "np.asarray": np.asarray,
    "jnp.dot": lambda w: jnp.dot(X, w),
    "np.dot": lambda w: np.dot(X, w),
    "einsum": lambda w: jnp.einsum("bi,io->bo", X, w),
    "concatenate": lambda w: jnp.concatenate([X, w]),
    "transpose": jnp.transpose,
    "cast": lambda w: lax.convert_element_type(w, jnp.float32),
    "promotion": lambda w: nn.dtypes.promote_dtype(X, w, dtype=None),
    "under jit and grad": lambda w: jax.jit(jax.grad(lambda x, w: (x @ w).sum()))(X, w),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_arrays_can_is_refused_with_the_remedy(name):
    with pytest.raises((TypeError, ValueError), match=REMEDY):
        OPERATIONS[name](W)


def nnx_linear(w):
    layer = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    layer.kernel.set_value(w)
    return nnx.jit(lambda layer, x: layer(x))(layer, X)


def equinox_linear(w):
    layer = eqx.tree_at(lambda layer: layer.weight, eqx.nn.Linear(64, 64, key=jax.random.key(0)), w)
    return eqx.filter_jit(layer)(X[0])


def haiku_linear(w):
    model = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(64)(x)))
    return model.apply({"linear": {"w": w, "b": jnp.zeros(64)}}, X)


@pytest.mark.parametrize("call", [nnx_linear, equinox_linear, haiku_linear])
def test_a_layer_that_was_not_wrapped(call):
    with pytest.raises((TypeError, ValueError), match=REMEDY):
        call(W)


def test_a_lax_function_names_the_type_at_least():
    with pytest.raises((TypeError, ValueError), match="QuantizedTensor"):
        lax.dot_general(X, W, (((1,), (0,)), ((), ())))


def test_a_linen_layer_that_was_not_wrapped_is_stopped_by_its_shape():
    with pytest.raises(Exception, match="existing parameter it received has shape"):
        nn.Dense(64).apply({"params": {"kernel": W, "bias": jnp.zeros(64)}}, X)


def test_what_it_is_asked_about_it_tells():
    assert (W.shape, W.ndim, W.size, W.dtype) == ((64, 64), 2, 4096, jnp.float32)
    assert np.shape(W) == jnp.shape(W) == (64, 64)
    assert [hasattr(W, name) for name in ("dtype", "sharding", "astype", "nothing")] == [True, False, False, False]
    with pytest.raises(AttributeError, match="'QuantizedTensor' object has no attribute 'nothing'"):
        _ = W.nothing
    with pytest.raises(TypeError, match="unhashable"):
        hash(W)
    shapes = jax.tree.map(jnp.shape, W)
    assert shapes == jax.tree.map(jnp.shape, copy.deepcopy(W)) != jax.tree.map(jnp.size, W)


def test_copies_and_trees_of_it_stay_what_they_are():
    for again in (copy.copy(W), copy.deepcopy(W), jax.tree.map(lambda leaf: leaf, W), eqx.filter_jit(lambda w: w)(W)):
        assert again.spec == W.spec
        np.testing.assert_array_equal(again.dequantize(), W.dequantize())
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path({"w": W})]
    assert paths == ["['w'].codes", "['w'].scales", "['w'].zeros"]


def test_every_quantized_tensor_of_a_tree_is_made_dense():
    half = round_to_nearest(jnp.ones((2, 40, 8), jnp.bfloat16), awq.QuantSpec(3, 32))
    params = {"a": W, "b": [half, jnp.arange(3)], "c": nn.Partitioned(W, ("x", None)), "d": None}
    found = awq.dequantize(params)
    assert jax.tree.map(lambda w: (w.shape, w.dtype.name), found) == {
        "a": ((64, 64), "float32"),
        "b": [((2, 40, 8), "bfloat16"), ((3,), "int32")],
        "c": nn.Partitioned(((64, 64), "float32"), ("x", None)),
        "d": None,
    }
    np.testing.assert_array_equal(found["a"], W.dequantize())
    np.testing.assert_array_equal(awq.dequantize(W), W.dequantize())
    np.testing.assert_array_equal(
        nn.Dense(64, use_bias=False).apply({"params": {"kernel": found["a"]}}, X), X @ found["a"]
    )

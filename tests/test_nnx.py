"""nnx modules: quantized ones compute and keep state like the ones they came from, which stay as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import awq_jax as awq

X = np.random.default_rng(0).normal(size=(32, 64)).astype("f4")


class Counting(nnx.Module):
    """Counts its calls, and drops out at random."""

    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(64, 128, rngs=rngs), nnx.Linear(128, 64, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        return self.down(self.drop(nnx.relu(self.up(x))))


@pytest.fixture(scope="module")
def pair():
    model = Counting(nnx.Rngs(0))
    return model, awq.quantize_module(model, [(X,), (2 * X,)], awq.Recipe(group_size=32))


def test_state_is_kept_and_the_module_stays_as_it_is(pair):
    model, (small, report) = pair
    assert {r.name for r in report if r.spec} == {"up/kernel", "down/kernel"}
    first, second = small(X), small(X)
    assert (np.asarray(first) != np.asarray(second)).any()
    assert int(small.rest["calls"][...]) == 2
    assert int(model.calls[...]) == 0


def test_it_computes_nearly_the_same(pair, doors):
    model = pair[0]
    model.eval()
    quiet, _ = awq.quantize_module(model, [(X,)], awq.Recipe(group_size=32))
    y, expected = nnx.jit(lambda m, x: m(x))(quiet, X), model(X)
    assert np.abs(y - expected).max() < 0.1 * np.abs(expected).max()
    assert doors == {"kernel": 2, "dense": 0}


def test_what_it_is_called_with_by_name_goes_to_the_module():
    class Scaled(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(64, 64, rngs=rngs)

        def __call__(self, x, by=1.0, negative=False):
            return self.linear(x) * (-by if negative else by)

    small, _ = awq.quantize_module(Scaled(nnx.Rngs(0)), [(X,)], awq.Recipe(group_size=32))
    np.testing.assert_allclose(small(X, by=3.0, negative=True), -3 * small(X), rtol=1e-5, atol=1e-6)


def test_a_linear_that_starts_quantized():
    layer = awq.QuantizedLinear(64, 32, awq.QuantSpec(4, 32), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    expected = X @ layer.kernel.get_value().dequantize()
    np.testing.assert_allclose(nnx.merge(graphdef, state)(X), expected, rtol=1e-4, atol=1e-4)
    assert layer(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert awq.QuantizedLinear(64, 32, awq.QuantSpec(4, 32), use_bias=False, rngs=nnx.Rngs(0)).bias is None


def test_a_dense_layer_refuses_another_shape():
    layer = awq.QuantizedDense(16, name=None)
    with pytest.raises(ValueError, match=r"kernel has shape \(64, 32\), the layer asks for \(64, 16\)"):
        layer.apply({"params": {"kernel": jnp.ones((64, 32))}}, X)
    params = awq.QuantizedDense(16, spec=awq.QuantSpec(4, 32)).init(jax.random.key(0), X)["params"]
    assert params["kernel"].spec == awq.QuantSpec(4, 32)
    np.testing.assert_allclose(
        layer.apply({"params": params}, X), X @ params["kernel"].dequantize(), rtol=1e-4, atol=1e-4
    )

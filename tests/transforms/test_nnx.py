"""nnx modules: quantized ones compute and keep state like the ones they came from, which stay as they are."""

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import awq_jax as awq

X = np.random.default_rng(0).normal(size=(32, 64)).astype("f4")
RTN = replace(awq.PRESETS["rtn"], group_size=32)


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
    assert int(small.calls[...]) == 2
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


class Named(nnx.Module):
    """Has attributes, a method beside the call, metadata of its params, a flag of evaluation, and sows."""

    def __init__(self, rngs):
        cut = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"), eager_sharding=False)
        self.up = nnx.Linear(64, 96, kernel_init=cut, rngs=rngs)
        self.down = nnx.Linear(96, 64, rngs=rngs)
        self.act, self.name = nnx.relu, "named"
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(self.act(self.encode(x))))

    def encode(self, x, by=1.0):
        return self.up(x) * by


@pytest.fixture(scope="module")
def named():
    model = Named(nnx.Rngs(0))
    model.eval()
    return model, awq.quantize_module(model, [(X,)], RTN)[0]


def test_it_prints_what_it_holds(named):
    for told in (repr(named[1]), str(named[1]), repr(nnx.state(named[1]))):
        assert "QuantizedTensor(shape=(64, 96), QuantSpec(bits=4, group_size=32, symmetric=False)" in told
    assert "module=Named(" in repr(named[1])
    assert len(repr(named[1])) < 4000
    sums = jax.tree.map(jnp.sum, nnx.state(named[1], nnx.Param))
    assert "QuantizedTensor(codes=" in repr(sums)
    abstract = nnx.eval_shape(lambda: awq.QuantizedLinear(64, 32, awq.QuantSpec(4, 32), rngs=nnx.Rngs(0)))
    assert "shape=(64, 32)" in repr(abstract)
    assert abstract.kernel.get_value().nbytes == 64 * 32 // 2 + 2 * 32 * (2 + 1)


def test_it_shows_in_treescope(named):
    treescope = pytest.importorskip("treescope")
    assert "bits=4" in treescope.render_to_text(named[1])


def test_what_the_module_has_it_has_too(named):
    model, small = named
    assert isinstance(small.module, Named)
    assert (small.name, small.act, small.up.out_features) == ("named", nnx.relu, 96)
    of = lambda m: {k: v for k, v in m.up.kernel.get_metadata().items() if "shard" in k}
    assert of(small) == of(model) != {}
    assert nnx.get_partition_spec(nnx.state(small.module))["up"]["kernel"].get_value() == P(None, "model")
    with pytest.raises(AttributeError, match="'Named' object has no attribute 'nothing'"):
        _ = small.nothing


def test_methods_run_quantized_too(named, doors):
    model, small = named
    found, expected = small.encode(X, by=2.0), model.encode(X, by=2.0)
    assert doors == {"kernel": 1, "dense": 0}
    assert np.abs(found - expected).max() < 0.2 * np.abs(expected).max()
    with pytest.raises(TypeError, match=r"awq\.quantized\(apply_fn\)"):
        small.up(X)


def test_it_trains_and_evaluates_when_told(named):
    small = nnx.clone(named[1])
    small.train()
    assert not small.drop.deterministic
    assert np.abs(small(X) - small(X)).max() > 0
    small.eval()
    np.testing.assert_array_equal(small(X), small(X))


def test_copies_run_alike(named):
    small = named[1]
    expected = small(X)
    for again in (nnx.clone(small), nnx.merge(*nnx.split(small)), copy.deepcopy(small)):
        np.testing.assert_array_equal(again(X), expected)


def test_saved_and_loaded_into_the_structure_alone(named, tmp_path):
    small = named[1]
    awq.save_params(tmp_path / "small", nnx.state(small.module, nnx.Param))
    graphdef, like, rest = nnx.split(nnx.clone(named[0]), nnx.Param, ...)
    like = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), like)
    loaded = nnx.merge(graphdef, awq.load_params(tmp_path / "small", like=like), rest)
    np.testing.assert_allclose(awq.QuantizedModule(loaded)(X), small(X), rtol=1e-5, atol=1e-5)


def test_dense_again(named):
    graphdef, state = nnx.split(named[1].module)
    whole = nnx.merge(graphdef, awq.dequantize(state))
    np.testing.assert_allclose(whole(X), named[1](X), rtol=1e-4, atol=1e-4)


class Stack(nnx.Module):
    """Layers stacked by nnx.vmap, run by nnx.scan, with an adapter beside."""

    def __init__(self, rngs):
        make = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: nnx.Linear(64, 64, rngs=rngs)))
        self.layers = make(rngs)
        self.adapter = nnx.LoRA(64, 4, 64, rngs=rngs)

    def __call__(self, x):
        y, _ = nnx.scan(lambda x, layer: (jnp.tanh(layer(x)), None), in_axes=(nnx.Carry, 0))(x, self.layers)
        return y + self.adapter(x)


def test_adapters_on_stacked_quantized_layers_are_trained(doors):
    small, report = awq.quantize_module(
        Stack(nnx.Rngs(0)), [(X,)], replace(RTN, rules=(awq.Rule("adapter", skip=True),))
    )
    assert {r.name for r in report if r.spec} == {"layers/kernel"}
    before = np.asarray(small.layers.kernel.get_value().codes)
    optimizer = nnx.Optimizer(small, optax.sgd(0.1), wrt=nnx.LoRAParam)
    loss = lambda model: jnp.square(model(X) - 1).mean()
    first, slopes = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(small)
    optimizer.update(small, slopes)
    assert doors["kernel"] > 0
    assert loss(small) < first
    np.testing.assert_array_equal(small.layers.kernel.get_value().codes, before)

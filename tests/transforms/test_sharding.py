"""Params that are sharded over a mesh: inside shard_map, and what becomes of their sharding."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import awq_jax as awq
from awq_jax.search import Grid, no_clip, to_nearest
from awq_jax.weights.tensor import is_quantized

WIDTH, HIDDEN, EXPERTS = 64, 128, 4
RECIPE = awq.Recipe(group_size=32, scale=Grid((0.0, 0.5)), clip=no_clip, rounding=to_nearest)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32)) / np.sqrt(shape[-2])


def inputs(*shape):
    x = np.random.default_rng(9).normal(size=shape) * np.exp(np.random.default_rng(8).normal(size=shape[-1]))
    return jnp.asarray(x.astype(np.float32))


def dense(qparams):
    return jax.tree.map(lambda w: w.dequantize(), qparams, is_leaf=is_quantized)


def mlp(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def sharded_mlp(mesh, check_vma):
    def body(params, x):
        return jax.lax.psum(mlp(params, x), "model")

    specs = {"up": P(None, "model"), "down": P("model", None)}
    return jax.shard_map(body, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"), check_vma=check_vma)


def heads(params, x):
    y = jnp.einsum("td,dhk->thk", x, params["up"])
    return jnp.einsum("thk,hkd->td", jax.nn.relu(y), params["down"])


def sharded_heads(mesh, check_vma):
    def body(params, x):
        return jax.lax.psum(heads(params, x), "model")

    specs = {"up": P(None, "model", None), "down": P("model", None, None)}
    return jax.shard_map(body, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"), check_vma=check_vma)


def experts(params, x):
    return jnp.einsum("etf,efd->etd", jax.nn.relu(jnp.einsum("etd,edf->etf", x, params["up"])), params["down"])


def sharded_experts(mesh, check_vma):
    specs = {"up": P("model"), "down": P("model")}
    x = P("model", "data")
    return jax.shard_map(experts, mesh=mesh, in_specs=(specs, x), out_specs=x, check_vma=check_vma)


def layers(block):
    def run(params, x):
        return jax.lax.scan(lambda x, p: (x + block(p, x), None), x, params)[0]

    return run


def sharded_layers(mesh, check_vma):
    return layers(sharded_mlp(mesh, check_vma))


def layers_inside(mesh, check_vma):
    def body(params, x):
        step = lambda x, p: (x + jax.lax.psum(mlp(p, x), "model"), None)
        return jax.lax.scan(step, x, params)[0]

    specs = {"up": P(None, None, "model"), "down": P(None, "model", None)}
    return jax.shard_map(body, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"), check_vma=check_vma)


def ragged(params, x):
    sizes = jnp.full(len(params["up"]), len(x) // len(params["up"]))
    return jax.lax.ragged_dot(jax.nn.relu(jax.lax.ragged_dot(x, params["up"], sizes)), params["down"], sizes)


def sharded_ragged(mesh, check_vma):
    specs = {"up": P("model"), "down": P("model")}
    return jax.shard_map(ragged, mesh=mesh, in_specs=(specs, P("model")), out_specs=P("model"), check_vma=check_vma)


def repeated(fn):
    def run(params, x):
        once = lambda x, _: (x + fn(params, x), None)
        x = jax.lax.scan(once, x, None, 2)[0]
        x = jax.lax.cond(x.sum() > 1e9, lambda x: x, lambda x: fn(params, x), x)
        return jax.lax.fori_loop(0, 2, lambda _, x: x + jax.checkpoint(fn)(params, x), x)

    return run


def sharded_repeated(mesh, check_vma):
    specs = {"up": P("model"), "down": P("model")}
    x = P("model", "data")
    return jax.shard_map(repeated(experts), mesh=mesh, in_specs=(specs, x), out_specs=x, check_vma=check_vma)


def nested_experts(mesh, check_vma):
    def body(params, x):
        specs = {"up": P("model"), "down": P("model")}
        inner = jax.shard_map(
            experts, in_specs=(specs, P("model")), out_specs=P("model"), axis_names={"model"}, check_vma=check_vma
        )
        return inner(params, x)

    x = P(None, "data")
    return jax.shard_map(body, mesh=mesh, in_specs=(P(), x), out_specs=x, axis_names={"data"}, check_vma=check_vma)


def put_together(mesh, check_vma):
    def body(params, x):
        whole = {
            "up": jax.lax.all_gather(params["up"], "data", axis=0, tiled=True),
            "down": jax.lax.all_gather(params["down"], "data", axis=1, tiled=True),
        }
        return mlp(whole, x)

    specs = {"up": P("data"), "down": P(None, "data")}
    return jax.shard_map(body, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"), check_vma=check_vma)


MATRIX = {"up": normal(0, WIDTH, HIDDEN), "down": normal(1, HIDDEN, WIDTH)}
HEADS = {"up": normal(0, WIDTH, HIDDEN).reshape(WIDTH, 4, 32), "down": normal(1, HIDDEN, WIDTH).reshape(4, 32, WIDTH)}
STACKED = {"up": normal(0, 3, WIDTH, HIDDEN), "down": normal(1, 3, HIDDEN, WIDTH)}
OF_EXPERTS = {"up": normal(0, EXPERTS, WIDTH, HIDDEN), "down": normal(1, EXPERTS, HIDDEN, WIDTH)}
CASES = {
    "rows and columns": (mlp, sharded_mlp, MATRIX, inputs(16, WIDTH)),
    "heads, one on each device": (heads, sharded_heads, HEADS, inputs(16, WIDTH)),
    "experts, one on each device": (experts, sharded_experts, OF_EXPERTS, inputs(EXPERTS, 16, WIDTH)),
    "sorted experts": (ragged, sharded_ragged, OF_EXPERTS, inputs(64, WIDTH)),
    "experts in loops and branches": (repeated(experts), sharded_repeated, OF_EXPERTS, inputs(EXPERTS, 16, WIDTH)),
    "experts in a shard_map inside another": (experts, nested_experts, OF_EXPERTS, inputs(EXPERTS, 16, WIDTH)),
    "put together on each device": (mlp, put_together, MATRIX, inputs(16, WIDTH)),
    "inside a scan": (layers(mlp), sharded_layers, STACKED, inputs(16, WIDTH)),
    "around a scan": (layers(mlp), layers_inside, STACKED, inputs(16, WIDTH)),
}


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return CASES[request.param]


@pytest.fixture(params=[True, False], ids=["typed", "untyped"])
def check_vma(request):
    return request.param


def test_moments_are_those_of_the_function_on_one_device(mesh, case, check_vma):
    whole, sharded, params, x = case
    expected = awq.calibrate(whole, params, [(x,)])
    found = awq.calibrate(sharded(mesh, check_vma), params, [(x,)])
    assert found.traced.sites.keys() == expected.traced.sites.keys() == {"up", "down"}
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())
    for name, moments in expected.moments.items():
        jax.tree.map(close, found.moments[name], moments)


def test_quantized_shards_are_multiplied_by_the_kernel(mesh, case, check_vma, doors):
    whole, sharded, params, x = case
    fn = sharded(mesh, check_vma)
    qparams, _ = awq.quantize(params, awq.calibrate(fn, params, [(x,)]), RECIPE)
    assert all(is_quantized(w) for w in qparams.values())
    found = jax.jit(awq.quantized(fn))(qparams, x)
    assert doors["kernel"]
    assert not doors["dense"]
    np.testing.assert_allclose(found, whole(dense(qparams), x), rtol=1e-4, atol=1e-4)


def test_gradients_through_quantized_shards(mesh, check_vma):
    fn, x = sharded_mlp(mesh, check_vma), inputs(16, WIDTH)
    qparams, _ = awq.quantize(MATRIX, awq.calibrate(fn, MATRIX, [(x,)]), RECIPE)
    slope = lambda f, p: jax.grad(lambda x: jnp.sum(f(p, x) ** 2))(x)
    np.testing.assert_allclose(slope(awq.quantized(fn), qparams), slope(mlp, dense(qparams)), rtol=1e-3, atol=1e-3)


def test_a_param_that_is_cut_in_two_ways_stays_dense(mesh):
    def fn(params, x):
        both = lambda cut, whole, x: experts(cut, x) + experts(jax.tree.map(lambda w: w[:1], whole), x)
        specs = {"up": P("model"), "down": P("model")}
        return jax.shard_map(both, mesh=mesh, in_specs=(specs, P(), P("model")), out_specs=P("model"))(
            params, params, x
        )

    found = awq.sites(fn, OF_EXPERTS, inputs(EXPERTS, 16, WIDTH)).sites
    assert {site.kept for site in found.values()} == {"also used by shard_map"}


@pytest.mark.parametrize("ranked", ["inside", "outside"])
def test_a_router_stays_dense_across_the_border(mesh, ranked):
    def top(logits):
        return jax.lax.top_k(logits, 2)[0]

    def fn(params, x):
        if ranked == "inside":
            logits = x @ params
            return jax.shard_map(top, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(logits)
        logits = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))(x, params)
        return top(logits)

    (site,) = awq.sites(fn, MATRIX["up"], inputs(16, WIDTH)).sites.values()
    assert "ranked" in site.kept


def test_a_mask_does_not_reach_into_shards(mesh):
    fn, x = sharded_mlp(mesh, True), inputs(16, WIDTH)
    with pytest.raises(ValueError, match="up: a mask does not reach tokens inside shard_map: leave it out"):
        awq.calibrate(fn, MATRIX, [(x,)], mask=lambda x: jnp.ones(len(x)))


def test_tokens_that_every_device_sees_count_once(mesh, check_vma):
    fn = jax.shard_map(mlp, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=check_vma)
    found = awq.calibrate(fn, MATRIX, [(inputs(16, WIDTH),)])
    assert {float(m.count) for m in found.moments.values()} == {16.0}


def test_a_data_parallel_function_keeps_its_folds(mesh):
    def norm_and_mlp(params, x):
        x = params["norm"][None] * x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True))
        return mlp(params, x)

    params = MATRIX | {"norm": jnp.ones(WIDTH)}
    fn = jax.shard_map(norm_and_mlp, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    found, expected = awq.sites(fn, params, inputs(16, WIDTH)), awq.sites(norm_and_mlp, params, inputs(16, WIDTH))
    assert [fold.sites for fold in found.folds] == [fold.sites for fold in expected.folds] == [("up",), ("down",)]
    qparams, _ = awq.quantize(params, awq.calibrate(fn, params, [(inputs(16, WIDTH),)]), replace(RECIPE, scales="both"))
    assert qparams["up"].input_scale is None


def test_a_sharded_param_is_not_folded(mesh):
    traced = awq.sites(sharded_mlp(mesh, True), MATRIX, inputs(16, WIDTH))
    assert not traced.folds
    assert traced.sites["down"].refused == "cut into shards"


def test_a_shard_that_cuts_a_group_is_made_dense(mesh, doors):
    fn, x = sharded_mlp(mesh, True), inputs(16, WIDTH)
    qparams, _ = awq.quantize(MATRIX, awq.calibrate(fn, MATRIX, [(x,)]), replace(RECIPE, group_size=128))
    found = awq.quantized(fn)(qparams, x)
    assert doors["kernel"]
    assert doors["dense"] == 1
    np.testing.assert_allclose(found, mlp(dense(qparams), x), rtol=1e-4, atol=1e-4)


SPECS = {"up": P(None, "model"), "down": P("model", None)}


def test_results_are_sharded_like_the_params(mesh):
    placed = {k: jax.device_put(w, NamedSharding(mesh, SPECS[k])) for k, w in MATRIX.items()}
    x = jax.device_put(inputs(16, WIDTH), NamedSharding(mesh, P("data")))
    calibration = awq.calibrate(mlp, placed, [(x,)])
    qparams, _ = awq.quantize(placed, calibration, RECIPE)
    for name, w in qparams.items():
        assert w.codes.sharding.spec == w.scales.sharding.spec == SPECS[name]
        assert w.codes.addressable_shards[0].data.size == w.codes.size // 4
    alone, _ = awq.quantize(MATRIX, awq.calibrate(mlp, MATRIX, [(inputs(16, WIDTH),)]), RECIPE)
    for name, w in qparams.items():
        same = np.mean(np.asarray(w.codes) == np.asarray(alone[name].codes))
        assert same > 0.9
    np.testing.assert_allclose(jax.jit(awq.quantized(mlp))(qparams, x), mlp(dense(qparams), x), rtol=1e-4, atol=1e-4)


def test_an_axis_that_cannot_be_cut_is_whole(mesh):
    qparams, _ = awq.quantize(MATRIX, awq.calibrate(mlp, MATRIX, [(inputs(16, WIDTH),)]), RECIPE)
    specs = {"up": P("model", "data"), "down": P(("data", "model"), None)}
    found = awq.partition_specs(qparams, specs, mesh)
    assert found["up"].codes == P(None, ("data",))
    assert found["down"].codes == P(None, None)


def test_partition_specs_name_every_leaf(mesh):
    qparams, _ = awq.quantize(MATRIX, awq.calibrate(mlp, MATRIX, [(inputs(16, WIDTH),)]), RECIPE)
    specs = awq.partition_specs(qparams, SPECS, mesh)
    assert specs["down"].codes == specs["down"].scales == specs["down"].zeros == P(("model",), None)
    assert specs["down"].input_scale == P(("model",))
    assert specs["up"].input_scale == P(None)
    placed = jax.device_put(qparams, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    assert placed["down"].codes.sharding.spec == P("model", None)


def test_boxed_params_keep_their_boxes(mesh):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            cut = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return nn.Dense(HIDDEN, kernel_init=cut)(x)

    model, x = Model(), inputs(16, WIDTH)
    variables = model.init(jax.random.key(0), x)
    small, (report,) = awq.quantize(variables, awq.calibrate(model.apply, variables, [(x,)]), RECIPE)
    assert report.name == "params/Dense_0/kernel"
    assert small["params"]["Dense_0"]["kernel"].names == (None, "model")
    specs = awq.partition_specs(small, nn.get_partition_spec(variables), mesh)
    placed = jax.device_put(small, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    kernel = placed["params"]["Dense_0"]["kernel"].value
    assert kernel.codes.sharding.spec == kernel.scales.sharding.spec == P(None, "model")
    expected = x @ kernel.dequantize()
    np.testing.assert_allclose(jax.jit(awq.quantized(model.apply))(placed, x), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="params/Dense_0/kernel is a param without a PartitionSpec"):
        awq.partition_specs(small, {"params": {"Dense_0": {"bias": P()}}}, mesh)
    with pytest.raises(ValueError, match="params/Dense_0/scale is a PartitionSpec without a param"):
        awq.partition_specs(small, {"params": {"Dense_0": {"bias": P(), "kernel": None, "scale": P()}}}, mesh)


def test_params_are_loaded_onto_their_shards(mesh, tmp_path):
    odd = MATRIX | {"bias": jnp.arange(8.0), "odd": normal(3, 40, 8)}
    fn = lambda p, x: mlp(p, x) + (x[:, :40] @ p["odd"]).sum() + p["bias"].sum()
    qparams, _ = awq.quantize(odd, awq.calibrate(fn, odd, [(inputs(16, WIDTH),)]), RECIPE)
    awq.save_params(tmp_path / "small", qparams)
    specs = SPECS | {"bias": P("model"), "odd": P("model", None)}
    place = lambda w, spec: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=NamedSharding(mesh, spec))
    found = awq.load_params(tmp_path / "small", like=jax.tree.map(place, odd, specs))
    assert found["up"].codes.sharding.spec == found["up"].scales.sharding.spec == P(None, "model")
    assert found["down"].codes.sharding.spec == P("model", None)
    assert {len(s.data) for s in found["bias"].addressable_shards} == {2}
    assert found["odd"].codes.sharding.is_fully_replicated, "a shard of 40 rows would cut a group"
    assert found["up"].codes.addressable_shards[0].data.size == found["up"].codes.size // 4
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(lambda w: w, qparams))
    again = awq.load_params(tmp_path / "small", like=found)
    assert jax.tree.map(lambda w: w.sharding, again) == jax.tree.map(lambda w: w.sharding, found)
    unplaced = awq.load_params(tmp_path / "small", like=odd)
    assert isinstance(unplaced["bias"], np.ndarray)
    x = inputs(16, WIDTH)
    np.testing.assert_allclose(
        jax.jit(awq.quantized(fn))(found, x), fn(awq.dequantize(qparams), x), rtol=1e-4, atol=1e-4
    )

"""QuantizedTensor goes where an array goes: jit, vmap, scan, shardings, checkpoints."""

import dataclasses
import subprocess
import sys
from textwrap import dedent

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from compilations import compilations
from jax.sharding import NamedSharding, PartitionSpec

from awq_jax.tracing.view import View
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import SCALE_DTYPE, QuantizedTensor, dot, is_quantized, round_to_nearest, with_input_scale

LAYERS, WIDTH = 3, 80
HEADS = View.of((WIDTH, 5, 16)).layout((), (0,))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(params=["plain", "symmetric", "input scale", "layout"])
def stacked(request) -> QuantizedTensor:
    """Square weights of three layers, stacked."""
    spec = QuantSpec(4, 32, symmetric=request.param == "symmetric")
    q = round_to_nearest(normal(LAYERS, WIDTH, WIDTH) / WIDTH**0.5, spec)
    if request.param == "input scale":
        q = with_input_scale(q, jnp.exp(normal(LAYERS, WIDTH, seed=2)))
    return dataclasses.replace(q, layout=HEADS) if request.param == "layout" else q


def layer(stacked: QuantizedTensor, index: int) -> QuantizedTensor:
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def dense_shape(w: QuantizedTensor) -> tuple[int, ...]:
    return (WIDTH, WIDTH) if w.layout is None else w.layout.shape


def test_shapes_follow_the_leaves(stacked):
    assert stacked.shape == (LAYERS, *dense_shape(stacked)) == stacked.dequantize().shape
    assert layer(stacked, 1).shape == dense_shape(stacked)
    np.testing.assert_array_equal(layer(stacked, 1).dequantize(), stacked.dequantize()[1])


def test_stacking_layers_gives_the_stack_back(stacked):
    layers = [layer(stacked, i) for i in range(LAYERS)]
    same(jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers), stacked)


def test_jit_carries_it_in_and_out_and_compiles_once(stacked):
    @jax.jit
    def doubled(w):
        assert w.shape == dense_shape(w)
        return dataclasses.replace(w, scales=2 * w.scales)

    with compilations() as compiled:
        outs = [doubled(layer(stacked, i)) for i in range(LAYERS)]
    assert compiled["doubled"] == 1
    np.testing.assert_array_equal(outs[2].dequantize(), 2 * stacked.dequantize()[2])


def test_vmap_over_stacked_leaves(stacked):
    def apply(x, w):
        assert w.shape == dense_shape(w)
        return dot(x, w)

    x = normal(LAYERS, 4, WIDTH, seed=1)
    expected = [dot(x[i], layer(stacked, i)) for i in range(LAYERS)]
    np.testing.assert_allclose(jax.vmap(apply)(x, stacked), expected, rtol=1e-5, atol=1e-5)


def test_vmapped_quantize_stacks(stacked):
    dense = normal(LAYERS, WIDTH, WIDTH)
    same(
        jax.vmap(lambda w: round_to_nearest(w, stacked.spec, steps=SCALE_DTYPE))(dense),
        round_to_nearest(dense, stacked.spec),
    )


def test_scan_slices_layers(stacked):
    def step(x, w):
        assert w.shape == dense_shape(w)
        x = dot(x, w)
        return x, w.dequantize()

    x = expected = normal(4, WIDTH, seed=1)
    for i in range(LAYERS):
        expected = dot(expected, layer(stacked, i))
    out, dense = jax.lax.scan(step, x, stacked)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dense, stacked.dequantize(), rtol=1e-6)


def test_is_quantized_stops_a_tree_map_at_the_weight(stacked):
    params = {"norm": jnp.ones(WIDTH), "kernel": stacked}
    dense = jax.tree.map(lambda w: w.dequantize() if is_quantized(w) else w, params, is_leaf=is_quantized)
    assert jax.tree.map(jnp.shape, dense) == {"norm": (WIDTH,), "kernel": stacked.shape}


def test_paths_name_the_fields(stacked):
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path({"kernel": stacked})]
    assert names[:2] == ["['kernel'].codes", "['kernel'].scales"]
    assert ("['kernel'].zeros" in names) == (not stacked.spec.symmetric)


def test_nbytes_counts_codes_steps_and_zero_points():
    q = round_to_nearest(normal(128, 64), QuantSpec(4, 32))
    assert q.nbytes == 128 * 64 // 2 + 4 * 64 * (2 + 1)


def test_device_put_with_a_sharding(stacked):
    mesh = jax.make_mesh((1,), ("layers",))
    sharding = NamedSharding(mesh, PartitionSpec("layers"))
    placed = jax.device_put(stacked, sharding)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(placed))
    same(placed, stacked)


ON_FOUR_DEVICES = """
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from awq_jax.weights.spec import QuantSpec
    from awq_jax.weights.tensor import dot, round_to_nearest

    mesh = jax.make_mesh((4,), ("model",))
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(8, 128)).astype(np.float32), rng.normal(size=(128, 64)).astype(np.float32)
    q = round_to_nearest(w, QuantSpec(4, 32))
    for spec in (P(None, "model"), P("model", None)):
        placed = jax.device_put(q, NamedSharding(mesh, spec))
        assert len(placed.codes.addressable_shards) == 4
        assert placed.codes.addressable_shards[0].data.size == q.codes.size // 4
        y = jax.jit(dot)(x, placed)
        np.testing.assert_allclose(y, x @ q.dequantize(), rtol=1e-5, atol=1e-4)
        if spec[1]:
            assert y.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2), y.sharding
    print("devices:", jax.device_count())
"""


def test_dot_with_a_weight_spread_over_four_devices(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    done = subprocess.run(
        [sys.executable, "-c", dedent(ON_FOUR_DEVICES)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "devices: 4\n"


def test_orbax_gives_the_tree_back(stacked, tmp_path):
    params = {"norm": jnp.ones(WIDTH), "layers": [{"kernel": stacked}]}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", params)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", jax.eval_shape(lambda: params))
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    assert jax.tree.map(lambda a: a.dtype, restored) == jax.tree.map(lambda a: a.dtype, params)
    same(restored, params)

"""4-bit codes as int4 arrays: the same weight, everywhere a weight goes; and who gets them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from awq_jax.commands import doctor
from awq_jax.formats.codecs import AUTOAWQ
from awq_jax.formats.orbax import load_params, save_params
from awq_jax.formats.quantized_writer import to_parts
from awq_jax.kernels import INT4, int4_matmul, target
from awq_jax.kernels.triton import launch
from awq_jax.tracing.view import View
from awq_jax.weights.sharding import partition_specs
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import dot, in_int4, in_rows, in_tiles, prepare, round_to_nearest, with_input_scale


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**32 - 1),
    groups=st.integers(1, 3),
    group=st.sampled_from([32, 96]),
    lead=st.sampled_from([(), (2, 3)]),
)
def test_element_p_o_r_holds_row_pg_r_of_column_o_minus_8(seed, groups, group, lead):
    codes = np.random.default_rng(seed).integers(0, 16, size=(*lead, groups * group, 5), dtype=np.uint8)
    by_group = INT4.pack(jnp.asarray(codes), 4, group)
    assert (by_group.dtype, by_group.shape) == (jnp.int4, (*lead, groups, 5, group))
    expected = np.moveaxis(codes.reshape(*lead, groups, group, 5), -1, -2).astype(int) - 8
    np.testing.assert_array_equal(np.asarray(by_group).astype(int), expected)
    np.testing.assert_array_equal(INT4.unpack(by_group, 4), codes)


@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(4, 96, symmetric=True), QuantSpec(4, -1)])
@pytest.mark.parametrize("rows", [20, 192, 200])
def test_it_is_the_same_weight(spec, rows):
    w = with_input_scale(round_to_nearest(normal(2, rows, 6), spec), np.exp(normal(2, rows, seed=1)))
    ready = in_int4(w)
    assert (ready.shape, ready.in_features, ready.matrix_shape) == (w.shape, rows, w.matrix_shape)
    np.testing.assert_array_equal(ready.dequantize(), w.dequantize())
    for again in (in_rows(ready), in_rows(in_int4(in_tiles(w))), in_rows(in_tiles(ready))):
        same(again, w)


def test_layers_are_sliced_by_scan_and_batched_by_vmap():
    w, x = round_to_nearest(normal(3, 64, 64), QuantSpec(4, 32)), normal(2, 64, seed=1)
    step = lambda x, w: (jnp.tanh(dot(x, w)), None)
    np.testing.assert_allclose(jax.lax.scan(step, x, in_int4(w))[0], jax.lax.scan(step, x, w)[0], atol=1e-4)
    each = jax.vmap(dot, (None, 0))
    np.testing.assert_allclose(each(x, in_int4(w)), each(x, w), rtol=1e-4, atol=1e-4)


def test_a_layout_survives():
    w = round_to_nearest(normal(3, 64, 6), QuantSpec(4, 32))
    w = dataclasses.replace(w, layout=View.of((64, 2, 3)).layout((), (0,)))
    assert in_int4(w).shape == (3, 64, 2, 3)
    np.testing.assert_array_equal(in_int4(w).dequantize(), w.dequantize())


def test_files_hold_words(tmp_path):
    w = round_to_nearest(normal(128, 16), QuantSpec(4, 64))
    jax.tree.map(np.testing.assert_array_equal, to_parts(AUTOAWQ, in_int4(w), "w"), to_parts(AUTOAWQ, w, "w"))
    save_params(tmp_path / "saved", {"w": in_int4(w), "b": np.zeros(1)})
    same(jax.tree.map(np.asarray, load_params(tmp_path / "saved")["w"]), jax.tree.map(np.asarray, w))


def test_it_is_exported():
    w, x = in_int4(round_to_nearest(normal(64, 6), QuantSpec(4, 32))), normal(3, 64)
    exported = jax.export.deserialize(jax.export.export(jax.jit(dot))(x, w).serialize())
    np.testing.assert_allclose(exported.call(x, w), dot(x, w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "arch", "missing", "packing"),
    [
        ("gpu", 90, None, "tiles"),
        ("gpu", 75, None, "tiles"),
        ("gpu", 90, "jax-triton not installed", "int4"),
        ("gpu", 70, None, "int4"),
        ("gpu", None, "jax-triton not installed", "tiles"),
        ("tpu", None, "jax-triton not installed", "int4"),
        ("cpu", None, "jax-triton not installed", "tiles"),
    ],
)
def test_prepare_packs_for_the_machine(monkeypatch, backend, arch, missing, packing):
    params = {
        "four": round_to_nearest(normal(64, 4), QuantSpec(4, 32)),
        "three": round_to_nearest(normal(64, 4), QuantSpec(3, 32)),
    }
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(launch, "missing", lambda: missing)
    with target(arch):
        ready = prepare(params)
        assert (ready["four"].packing, ready["three"].packing) == (packing, "rows")
        same(prepare(ready), ready)
        same(prepare({"four": in_tiles(params["four"])})["four"], ready["four"])


@pytest.mark.parametrize(
    ("backend", "arch", "decode", "prefill", "advice"),
    [
        ("tpu", None, "reads 4-bit codes", "makes each weight dense", "weights in int4: awq_jax.prepare"),
        ("gpu", 90, "reads 4-bit codes", "makes each weight dense", "jax-triton not installed; weights in int4"),
    ],
)
def test_doctor_says_which(monkeypatch, backend, arch, decode, prefill, advice):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(launch, "missing", lambda: "jax-triton not installed")
    with target(arch):
        found = {f.what: f for f in doctor.examine()}
    assert found["decode (1 row)"].found == f"plain XLA, {decode}"
    assert found["prefill (512 rows)"].found == f"plain XLA, {prefill}"
    assert advice in found["decode (1 row)"].advice


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])


@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize(
    ("shape", "x_spec", "w_spec", "y_spec"),
    [
        ((256, 64), P(), P(None, "model"), P(None, "model")),
        ((256, 64), P(None, "model"), P("model"), P()),
        ((4, 256, 64), P("model"), P("model"), P("model")),
    ],
    ids=["columns", "inputs", "experts"],
)
def test_xla_cuts_it_and_gathers_no_weight(mesh, shape, x_spec, w_spec, y_spec, m):
    w = with_input_scale(round_to_nearest(normal(*shape), QuantSpec(4, 64)), np.exp(normal(*shape[:-1], seed=1)))
    x = jnp.asarray(normal(*shape[:-2], m, 256, seed=2), jnp.bfloat16)
    ready = in_int4(w)
    place = lambda tree, specs: jax.device_put(tree, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    placed = place(ready, partition_specs({"w": ready}, {"w": w_spec}, mesh)["w"])
    assert placed.codes.addressable_shards[0].data.size == ready.codes.size // 4
    f = jax.jit(int4_matmul, out_shardings=NamedSharding(mesh, y_spec))
    text = f.lower(place(x, x_spec), placed).compile().as_text()
    gathered = re.findall(r"= \(?(\w+)\S* (?:all-gather|all-to-all|collective-permute)", text)
    assert not gathered, gathered
    assert ("all-reduce" in text) == (x_spec == P(None, "model"))
    y, expected = f(place(x, x_spec), placed), np.asarray(int4_matmul(x, w), np.float32)
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, rtol=0.02, atol=0.02 * np.abs(expected).max())

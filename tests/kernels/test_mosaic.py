"""The kernel for Hopper in the emulator of Pallas, against numpy in float64; what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from awq_jax.kernels import int4_matmul, target
from awq_jax.kernels.mosaic import kernel as mosaic_kernels
from awq_jax.kernels.mosaic import matmul as mosaic
from awq_jax.kernels.tilings import table
from awq_jax.kernels.tilings.table import Tiling
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import SCALE_DTYPE, in_tiles, round_to_nearest, with_input_scale

pytestmark = pytest.mark.slow

plgpu = mosaic_kernels.plgpu
emulated = pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="jax emulates GPUs from 0.11 on")
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
SMALL = Tiling("mosaic", bm=16, bn=128, warps=12, stages=2)


def lifted(words, plane, dtype):
    """As mosaic_kernels.lifted, without inline assembly."""
    codes = (words >> jnp.int16(4 * plane)) & jnp.int16(15)
    return lax.bitcast_convert_type(codes | jnp.int16(mosaic_kernels.magic(dtype)), dtype)


@pytest.fixture
def emulator(monkeypatch):
    """Emulates wgmma of shared memory alone, so what the kernel has in registers is put there first."""
    kernel, wgmma, staged = plgpu.kernel, plgpu.wgmma, []

    def with_room(body, *, scratch_types, **options):
        def stage(*refs, weights, **scratch):
            staged[:] = [weights]
            body(*refs, **scratch)

        room = {name: plgpu.SMEM((2, mosaic_kernels.COLUMNS, 32), name) for name in ROUNDING}
        return kernel(stage, scratch_types={**scratch_types, "weights": room}, **options)

    def from_memory(sums, w, x):
        place = staged[0][w.dtype.name].at[lax.axis_index("warpgroup")]
        place[...] = w
        plgpu.commit_smem()
        wgmma(sums, place, x)

    monkeypatch.setattr(plgpu, "kernel", with_room)
    monkeypatch.setattr(plgpu, "wgmma", from_memory)
    monkeypatch.setattr(mosaic_kernels, "lifted", lifted)
    with target(90), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@emulated
@pytest.mark.parametrize(
    ("lead", "rows", "k", "n", "spec", "dtype", "result"),
    [
        ((), 24, 256, 192, QuantSpec(4, 128), "bfloat16", None),
        ((), 5, 256, 64, QuantSpec(4, 32), "float16", None),
        ((), 16, 128, 128, QuantSpec(4, 64, symmetric=True), "bfloat16", "float32"),
        ((), 33, 384, 64, QuantSpec(4, 256), "bfloat16", None),
        ((), 8, 256, 64, QuantSpec(4, -1), "float16", None),
        ((2,), 20, 128, 64, QuantSpec(4, 64), "bfloat16", None),
    ],
)
def test_the_product_is_within_its_bound(emulator, lead, rows, k, n, spec, dtype, result):
    """The bound of the kernel of many rows: see test_kernels.py."""
    w = with_input_scale(round_to_nearest(normal(*lead, k, n) + 0.3, spec), np.exp(normal(*lead, k, seed=1)))
    w = dataclasses.replace(w, scales=w.scales * np.exp(normal(*w.scales.shape, seed=2)).astype(np.float16))
    x = jnp.asarray(normal(*lead, rows, k, seed=3), dtype)
    y = mosaic.matmul(x, in_tiles(w), dtype=result, tiling=SMALL)
    dense, x = np.asarray(w.dequantize(), np.float64), np.asarray(x, np.float64)
    product, magnitude = x @ dense, np.abs(x) @ np.abs(dense)
    u = ROUNDING[dtype]
    bound = (k * 2.0**-24 + 4 * u) * magnitude + u * np.abs(product)
    assert y.dtype == (result or dtype)
    assert np.all(np.abs(np.asarray(y, np.float64) - product) <= bound)


@emulated
@pytest.mark.parametrize("k", [128, 640])
@pytest.mark.parametrize("bm", [16, 128, 192])
def test_a_program_takes_tile_after_tile(emulator, monkeypatch, bm, k):
    """Of two matrices, with more copies in flight than there are rounds, or fewer."""
    monkeypatch.setattr(mosaic, "multiprocessors", lambda: 1)
    w = jax.vmap(lambda w: in_tiles(round_to_nearest(w, QuantSpec(4, 64), steps=SCALE_DTYPE)))(normal(2, k, 192))
    x = jnp.asarray(normal(2, 2 * bm - 8, k, seed=1), jnp.bfloat16)
    y = mosaic.matmul(x, w, tiling=dataclasses.replace(SMALL, bm=bm, stages=3))
    expected = np.asarray(x, np.float64) @ np.asarray(jax.vmap(lambda w: w.dequantize())(w), np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=0.02 * np.abs(expected).max())


@emulated
def test_a_batched_weight_is_one_call_of_experts(emulator):
    w = jax.vmap(lambda w: in_tiles(round_to_nearest(w, QuantSpec(4, 64), steps=SCALE_DTYPE)))(normal(2, 128, 64))
    x = jnp.asarray(normal(2, 8, 128, seed=1), jnp.bfloat16)
    one = lambda x, w: int4_matmul(x, w, implementation="mosaic")
    y = jax.vmap(one)(x, w)
    for i in range(2):
        np.testing.assert_array_equal(y[i], one(x[i], jax.tree.map(lambda leaf, i=i: leaf[i], w)))


def test_what_it_refuses():
    def refused(match, x_dtype=jnp.bfloat16, arch=90, shape=(256, 128), group=128, pack=in_tiles, bits=4):
        w = pack(round_to_nearest(normal(*shape), QuantSpec(bits, group)))
        x = jnp.ones((64, shape[0]), x_dtype)
        with target(arch), pytest.raises(NotImplementedError, match=match):
            int4_matmul(x, w, implementation="mosaic")

    refused("sm_80", arch=80)
    with pytest.raises(NotImplementedError, match="no NVIDIA GPU is here"):
        int4_matmul(
            jnp.ones((64, 64), jnp.bfloat16),
            in_tiles(round_to_nearest(normal(64, 64), QuantSpec())),
            implementation="mosaic",
        )
    refused("sm_100", arch=100)
    refused("float32", x_dtype=jnp.float32)
    refused("200 x 128", shape=(200, 128))
    refused("256 x 100", shape=(256, 100))
    refused("groups of 96", shape=(384, 128), group=96)
    refused("8-bit", bits=8, pack=lambda w: w)
    refused("prepare", pack=lambda w: w)


def test_it_runs_only_where_it_is_asked_for_until_it_is_timed():
    chosen = {table.tiling(90, "bfloat16", 128, m, 4096, 4096).kernel for m in (1, 64, 256, 1024, 4096)}
    assert chosen == {"decode", "tile", "dense"}


@pytest.mark.parametrize(
    ("m", "n", "bm"), [(1, 4096, 64), (128, 4096, 64), (128, 28672, 128), (512, 4096, 64), (1024, 4096, 128)]
)
def test_tiles_are_small_where_large_ones_leave_multiprocessors_idle(m, n, bm):
    assert table.mosaic_tiling(m, n, 132).bm == bm


@pytest.mark.parametrize("m", [1, 64, 100, 200, 4096])
@pytest.mark.parametrize("result", ["bfloat16", "float32"])
@pytest.mark.parametrize("group", [32, 128])
def test_shared_memory_holds_two_rounds_or_more(group, result, m):
    t = table.mosaic_tiling(m, 4096, 132)
    w = in_tiles(round_to_nearest(normal(128, 64), QuantSpec(4, group)))
    assert 2 <= mosaic.stages(t, w, jnp.dtype(result)) <= t.stages

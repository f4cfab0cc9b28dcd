"""The kernels on a GPU against float64: `pytest benchmarks/gpu_checks.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax.kernels import grouped_int4_matmul, int4_matmul, mosaic, triton
from awq_jax.kernels.gpu import architecture
from awq_jax.spec import QuantSpec
from awq_jax.tensor import in_tiles, quantize


def check(y, x, w) -> None:
    dense, x = np.asarray(w.dequantize(), np.float64), np.asarray(x, np.float64)
    bound = 4 * float(jnp.finfo(y.dtype).eps) + x.shape[-1] * 2.0**-24
    assert np.all(np.abs(np.asarray(y, np.float64) - x @ dense) <= bound * (np.abs(x) @ np.abs(dense)))


@pytest.mark.parametrize("group", [32, 96, 128, -1])
@pytest.mark.parametrize(
    ("rows", "dtype"),
    [(rows, dtype) for dtype in ("bfloat16", "float16") for rows in (1, 8, 13, 32, 64, 100, 300, 1100)]
    + [(1, "float32"), (8, "float32")],
)
def test_the_product(rows, dtype, group):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, 1000)), dtype)
    w = in_tiles(quantize(rng.normal(size=(1000, 330)).astype(np.float32), QuantSpec(4, group)))
    check(jax.jit(int4_matmul, static_argnames="implementation")(x, w, implementation="triton"), x, w)


@pytest.mark.skipif(architecture() != mosaic.HOPPER, reason="wgmma is an instruction of Hopper alone")
@pytest.mark.parametrize("group", [32, 128, 256, -1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [40, 128, 200, 1100])
def test_the_product_on_hopper(rows, dtype, group):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, rows, 1024)), dtype)
    w = in_tiles(quantize(rng.normal(size=(2, 1024, 320)).astype(np.float32), QuantSpec(4, group)))
    check(jax.jit(int4_matmul, static_argnames="implementation")(x, w, implementation="mosaic"), x, w)


@pytest.mark.parametrize("rows", [1, 13, 32])
@pytest.mark.parametrize("widths", [(330, 64, 64), (330, 330)])
def test_weights_of_one_input_in_one_launch(widths, rows):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, 1000)), jnp.bfloat16)
    ws = [in_tiles(quantize(rng.normal(size=(1000, n)).astype(np.float32), QuantSpec(4, 128))) for n in widths]
    for y, w in zip(jax.jit(triton.shared_matmul)(x, *ws), ws, strict=True):
        check(y, x, w)


def test_ragged_rows():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(200, 512)), jnp.bfloat16)
    w = in_tiles(quantize(rng.normal(size=(4, 512, 256)).astype(np.float32), QuantSpec(4, 128)))
    sizes = jnp.array([3, 0, 150, 40])
    y = grouped_int4_matmul(x, w, sizes, implementation="triton")
    expected = grouped_int4_matmul(x, w, sizes, implementation="xla")
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(expected, np.float32), atol=1.5, rtol=0.03)

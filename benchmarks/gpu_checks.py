"""The kernels on a GPU against float64: `pytest benchmarks/gpu_checks.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax.kernels import grouped_int4_matmul, int4_matmul
from awq_jax.spec import QuantSpec
from awq_jax.tensor import in_tiles, quantize


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("rows", [1, 8, 13, 32, 64, 100, 300])
def test_the_product(rows, group, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, 1000)), dtype)
    w = in_tiles(quantize(rng.normal(size=(1000, 330)).astype(np.float32), QuantSpec(4, group)))
    y = np.asarray(jax.jit(int4_matmul, static_argnames="implementation")(x, w, implementation="triton"), np.float64)
    dense = np.asarray(w.dequantize(), np.float64)
    magnitude = np.abs(np.asarray(x, np.float64)) @ np.abs(dense)
    assert np.all(np.abs(y - np.asarray(x, np.float64) @ dense) <= 4 * float(jnp.finfo(dtype).eps) * magnitude)


def test_ragged_rows():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(200, 512)), jnp.bfloat16)
    w = in_tiles(quantize(rng.normal(size=(4, 512, 256)).astype(np.float32), QuantSpec(4, 128)))
    sizes = jnp.array([3, 0, 150, 40])
    y = grouped_int4_matmul(x, w, sizes, implementation="triton")
    expected = grouped_int4_matmul(x, w, sizes, implementation="xla")
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(expected, np.float32), atol=1.5, rtol=0.03)

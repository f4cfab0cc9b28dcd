import jax.numpy as jnp
import pytest

from awq_jax.machine import dtype_for


@pytest.mark.parametrize(
    ("backend", "processor", "dtype"),
    [
        ("gpu", "", jnp.bfloat16),
        ("cpu", "flags : fpu avx2 avx512f avx512_bf16 fma", jnp.bfloat16),
        ("cpu", "flags : amx_bf16 amx_tile", jnp.bfloat16),
        ("cpu", "flags : fpu avx2 avx512f avx512_bf16x", jnp.float32),
        ("cpu", "flags : fpu avx2 fma", jnp.float32),
        ("cpu", "", jnp.float32),
    ],
)
def test_bfloat16_where_the_processor_multiplies_it(backend, processor, dtype):
    assert dtype_for(backend, processor) is dtype

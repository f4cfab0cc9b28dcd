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


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [("7.5", jnp.float32), ("8.0", jnp.bfloat16), ("10.0", jnp.bfloat16), ("gfx942", jnp.bfloat16), ("", jnp.bfloat16)],
)
def test_old_gpus_have_no_bfloat16(capability, dtype):
    assert dtype_for("gpu", "", capability) is dtype

import jax.numpy as jnp
import pytest

from awq_jax import machine
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


def test_free_memory_is_what_the_container_leaves(tmp_path, monkeypatch):
    assert machine.left_to_container(tmp_path) is None
    for name, content in (("max", "1000"), ("current", "900"), ("stat", "anon 5\ninactive_file 300\nslab 7\n")):
        (tmp_path / f"memory.{name}").write_text(content)
    assert machine.left_to_container(tmp_path) == 400
    for system, container, free in ((None, None, 0), (700, None, 700), (700, 400, 400), (300, 400, 300), (9, -5, 1)):
        monkeypatch.setattr(machine, "left_to_system", lambda system=system: system)
        monkeypatch.setattr(machine, "left_to_container", lambda container=container: container)
        assert machine.free_memory() == free
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.undo()
    assert machine.left_to_container(tmp_path) is None

"""What a user of a GPU is told: once which path runs and why, and what of the installation is wrong."""

import importlib.util
import sys
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax.kernels import chooser, grouped_int4_matmul, int4_matmul, shared_int4_matmul, target
from awq_jax.kernels.triton import launch
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import in_tiles, round_to_nearest


def weight(*shape: int, bits: int = 4, tiles: bool = True):
    w = round_to_nearest(np.random.default_rng(0).normal(size=shape).astype(np.float32), QuantSpec(bits, 32))
    return in_tiles(w) if tiles else w


def x(rows: int, dtype=jnp.bfloat16):
    return jnp.ones((rows, 64), dtype)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """An H100, as far as the chooser can see, with the packages that run kernels on it."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(launch, "missing", lambda: None)
    chooser.tell.cache_clear()
    with target(90):
        yield
    chooser.tell.cache_clear()


CASES = {
    "codes in rows": (lambda: [int4_matmul(x(m), weight(64, 8, tiles=False)) for m in (1, 2, 600)], "awq_jax.prepare"),
    "3 bits": (lambda: [int4_matmul(x(m), weight(64, n, bits=3, tiles=False)) for m, n in ((1, 8), (2, 9))], "3-bit"),
    "float8": (lambda: [int4_matmul(x(m, jnp.float8_e4m3fn), weight(64, 8)) for m in (1, 2)], "float8_e4m3fn.*cast x"),
    "many rows of float32": (
        lambda: [int4_matmul(x(m, jnp.float32), weight(64, n)) for m, n in ((9, 8), (70, 9))],
        "more than 8 rows of float32 on sm_90",
    ),
    "sorted rows of float32": (
        lambda: [grouped_int4_matmul(x(m, jnp.float32), weight(2, 64, 8), jnp.array([1, 2])) for m in (3, 5)],
        "sorted rows of float32 on sm_90",
    ),
    "weights of one input": (
        lambda: [shared_int4_matmul(x(1), *[weight(64, 8, tiles=False)] * 2) for _ in range(2)],
        "awq_jax.prepare",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_slow_path_is_told_once_with_its_reason(on_a_gpu, name):
    run, reason = CASES[name]
    with pytest.warns(UserWarning, match=f"runs as plain XLA, slower than it could.*triton: .*{reason}") as told:
        run()
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()


def test_without_a_gpu_nothing_is_told():
    chooser.tell.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for run, _ in CASES.values():
            run()


def test_a_triton_that_compiles_many_rows_to_a_trap_is_not_used_for_them(monkeypatch, on_a_gpu):
    triton = pytest.importorskip("triton", reason="triton has wheels for Linux only")
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    assert all(launch.too_old(kernel) is None for kernel in ("decode", "tile", "ragged"))
    with target(100):
        assert launch.too_old("decode") is None
        advice = r"triton 3\.6\.0 compiles many rows wrongly for sm_100: pip install 'triton>=3\.9'"
        for run in (
            lambda: int4_matmul(x(40), weight(64, 8)),
            lambda: grouped_int4_matmul(x(3), weight(2, 64, 8), jnp.array([1, 2])),
        ):
            chooser.tell.cache_clear()
            with pytest.warns(UserWarning, match=advice):
                run()
        monkeypatch.setattr(triton, "__version__", "3.9.0")
        assert launch.too_old("tile") is None


def test_packages_that_lack_are_told(monkeypatch, on_a_gpu):
    monkeypatch.undo()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"triton and jax-triton not installed: pip install 'awq-jax\[cuda12\]'"):
        int4_matmul(x(1), weight(64, 8))


@pytest.fixture
def _asked_again():
    launch.broken.cache_clear()
    yield
    launch.broken.cache_clear()


@pytest.mark.usefixtures("_asked_again")
def test_packages_that_do_not_fit_each_other_are_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    reason = launch.missing()
    assert f"jax-triton cannot be imported beside jax {jax.__version__} (ModuleNotFoundError" in reason
    with target(90), pytest.raises(NotImplementedError, match="cannot be imported"):
        int4_matmul(x(1), weight(64, 8), implementation="triton")
    # Every package is said to be here, that of CUDA 13 too.
    assert reason.endswith("pip install 'awq-jax[cuda13]'")

import os
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import pytest
from hypothesis import settings

# XLA's older way to code for CPUs takes half the time; jax 0.11 and newer no longer have it.
OLD_EMITTERS = " --xla_cpu_use_fusion_emitters=false" if version("jax").startswith("0.10.") else ""
MAPS = Path("/proc/self/maps")

settings.register_profile("awq_jax", deadline=None, max_examples=30, derandomize="CI" in os.environ)
settings.load_profile("awq_jax")


def pytest_configure(config: pytest.Config) -> None:
    """What XLA compiled is shared by the workers and kept for the next run: `pytest --cache-clear` forgets it.

    Small models, those of public packages too, run for a shorter time than LLVM would take to make them faster.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("programs")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if "not model" in config.option.markexpr or all("tests/public" in path for path in config.args):
        os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0" + OLD_EMITTERS


@pytest.fixture(autouse=True, scope="module")
def programs_are_dropped():
    """A process has room for 65,530 memory maps only: before they are too many, what was compiled goes."""
    yield
    import jax

    if not MAPS.exists() or MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def _no_tilings_of_the_user(tmp_path_factory):
    """What this user measured on a GPU of theirs is not what the tests are about."""
    from awq_jax.kernels.tilings import table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "users_file", lambda: tmp_path_factory.getbasetemp() / "no_tilings.jsonl")
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The .gguf of SmolLM2-135M in the user's cache, fetched on first use."""
    from awq_jax.commands.demo import fetch_smollm2

    return fetch_smollm2()


@pytest.fixture
def doors(monkeypatch) -> dict[str, int]:
    """How often a quantized weight went through the kernel, and how often it was made dense instead."""
    from awq_jax.weights import tensor

    calls = {"kernel": 0, "dense": 0}
    doors = {
        "int4_matmul": "kernel",
        "grouped_int4_matmul": "kernel",
        "shared_int4_matmul": "kernel",
        "dequantize": "dense",
    }
    for attribute, name in doors.items():
        original = getattr(tensor.kernels, attribute)

        def counted(*args, name=name, original=original, **options):
            calls[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(tensor.kernels, attribute, counted)
    return calls

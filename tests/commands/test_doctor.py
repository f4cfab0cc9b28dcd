"""What `awq-jax doctor` finds and advises."""

import importlib.metadata

import jax
import pytest

from awq_jax.commands import doctor
from awq_jax.kernels.tilings import table
from awq_jax.kernels.tilings.table import Case, Tiling
from awq_jax.kernels.triton import launch


@pytest.fixture
def installed(monkeypatch):
    """Pretends that exactly these versions are installed."""

    def pretend(**versions: str) -> None:
        names = {name.replace("_", "-"): version for name, version in versions.items()}

        def version(name: str) -> str:
            if name in names:
                return names[name]
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


def finding(what: str) -> doctor.Finding:
    return next(f for f in doctor.examine() if f.what == what)


def test_this_machine():
    assert finding("jax").found == jax.__version__
    assert finding("decode (1 row)").found == "plain XLA"
    assert "no GPU" in finding("device").found


def test_without_a_plugin_it_says_what_to_install(installed):
    installed(jax="0.11.2", jaxlib="0.11.2")
    assert "awq-jax[cuda12]" in finding("device").advice
    assert finding("triton").found == "not installed"


def test_a_platform_that_does_not_start_is_no_end(monkeypatch):
    def none():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "devices", none)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert "Unable to initialize" in finding("device").found
    assert "JAX_PLATFORMS=cuda does not start here" in finding("device").advice


def test_a_plugin_of_another_version_is_named(installed):
    installed(jaxlib="0.11.2", jax_cuda12_plugin="0.10.2")
    assert "jax-cuda12-plugin 0.10.2 and jaxlib 0.11.2 differ" in finding("device").advice
    installed(jaxlib="0.11.2", jax_cuda12_plugin="0.11.2")
    assert finding("device").advice == ""


@pytest.mark.parametrize(
    ("arch", "decode", "prefill", "reason"),
    [
        (90, "Triton, decode 8 x 16", "Triton, tile 128 x 128", "awq_jax.prepare"),
        (75, "Triton, gemv 1 x 16", "plain XLA", "more than 8 rows of bfloat16 on sm_75 would need tensor cores"),
        (70, "plain XLA, reads 4-bit codes", "plain XLA, makes each weight dense", "the GPU is sm_70"),
    ],
)
def test_on_a_gpu(monkeypatch, arch, decode, prefill, reason):
    from awq_jax import kernels

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(launch, "missing", lambda: None)
    with kernels.target(arch):
        assert finding("decode (1 row)").found == decode
        assert finding("prefill (512 rows)").found == prefill
        assert reason in finding("prefill (512 rows)").advice


@pytest.mark.parametrize(
    ("tiling", "said"),
    [(Tiling("mosaic", 256, 128, 12, 2), "Pallas Mosaic GPU, 256 x 128"), (Tiling("dense"), "plain XLA, makes")],
)
def test_what_was_measured_here_is_said(monkeypatch, tmp_path, tiling, said):
    from awq_jax import kernels

    monkeypatch.setattr(table, "users_file", lambda: tmp_path / "tilings.jsonl")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(launch, "missing", lambda: None)
    try:
        with kernels.target(90):
            table.remember(Case(90, "bfloat16", 128, 512, 4096, 4096), tiling)
            assert finding("prefill (512 rows)").found.startswith(said)
    finally:
        table.remembered.cache_clear()


def test_a_missing_package_is_the_reason(monkeypatch):
    from awq_jax import kernels

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with kernels.target(90):
        assert "triton and jax-triton not installed: pip install" in finding("prefill (512 rows)").advice

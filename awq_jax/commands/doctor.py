"""`awq-jax doctor`: which packages and GPU or TPU are here, what would run the matmuls, and what to install."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass

PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "triton", "jax-triton")


@dataclass(frozen=True)
class Finding:
    """One line of the report; `advice` says what to do, if anything."""

    what: str
    found: str
    advice: str = ""


def versions() -> dict[str, str | None]:
    """The installed version of each package that matters to a GPU, None where there is none."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in PACKAGES}


def examine() -> list[Finding]:
    """What is here, and what serves a decode step and a prefill of a 4-bit weight of 4096 x 4096."""
    installed = versions()
    findings = [Finding("python", f"{platform.python_version()} on {sys.platform}")]
    findings += [Finding(name, version or "not installed") for name, version in installed.items()]
    import jax

    try:
        device = jax.devices()[0]
    except (RuntimeError, AssertionError) as e:
        asked = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        advice = f"{asked} does not start here: {_plugin(installed) or 'unset it, or mend what jax says'}"
        return [*findings, Finding("device", f"none: {e}".strip(": "), advice)]
    if jax.default_backend() == "tpu":
        findings.append(Finding("device", device.device_kind))
    else:
        on_gpu = jax.default_backend() == "gpu"
        name = device.device_kind if on_gpu else f"{device.device_kind}, no GPU"
        findings.append(Finding("device", name, _plugin(installed)))
    findings.append(Finding("decode (1 row)", *_serves(1)))
    findings.append(Finding("prefill (512 rows)", *_serves(512)))
    return findings


def _plugin(installed: dict[str, str | None]) -> str:
    """What is wrong with the CUDA plugin, in words."""
    plugins = {name: installed[name] for name in PACKAGES if name.endswith("plugin") and installed[name]}
    if not plugins:
        return (
            "for an NVIDIA GPU: pip install 'awq-jax[cuda12]', or [cuda13] with a driver of CUDA 13; "
            "for a TPU: pip install 'jax[tpu]'"
        )
    wrong = [f"{name} {version}" for name, version in plugins.items() if version != installed["jaxlib"]]
    if wrong:
        cuda = next(iter(plugins)).split("-")[1]
        return f"{', '.join(wrong)} and jaxlib {installed['jaxlib']} differ: pip install -U 'awq-jax[{cuda}]'"
    return ""


def _serves(rows: int) -> tuple[str, str]:
    """Which implementation multiplies `rows` rows of bfloat16 on this machine, and what keeps a faster one away."""
    import jax
    import jax.numpy as jnp

    from awq_jax.kernels import INT4, best_packing
    from awq_jax.kernels.chooser import TABLED, TRIED
    from awq_jax.kernels.gpu import architecture
    from awq_jax.weights.spec import QuantSpec
    from awq_jax.weights.tensor import SCALE_DTYPE, in_tiles, packed_as, round_to_nearest

    dense, packing = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16), best_packing()
    x = jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16)
    w = jax.eval_shape(lambda dense: round_to_nearest(dense, QuantSpec(), steps=SCALE_DTYPE), dense)
    ready, on_gpu = jax.eval_shape(lambda w: packed_as(w, packing), w), architecture() is not None
    runs = next(i for i in TRIED if (on_gpu or i is not TABLED) and not i.refuses(x, ready))
    reason = TABLED.refuses(x, jax.eval_shape(in_tiles, w)) if on_gpu else None
    to_do = f"weights in {packing.name}: awq_jax.prepare(params) after loading"
    advice = [reason or "", to_do if packing is INT4 or (on_gpu and not reason) else ""]
    return runs.described(x, ready, None), "; ".join(filter(None, advice))

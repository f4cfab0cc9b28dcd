"""What this machine is good at."""

from __future__ import annotations

import functools as ft
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


@ft.cache
def fast_dtype() -> Any:
    """bfloat16 where matmuls in it are faster than in float32, otherwise float32."""
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        processor = ""
    capability = getattr(jax.devices()[0], "compute_capability", "")
    return dtype_for(jax.default_backend(), processor, str(capability))


def free_memory() -> int:
    """Bytes that can still be taken without swapping; 0 where the system does not tell."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def dtype_for(backend: str, processor: str, capability: str = "") -> Any:
    """bfloat16 on accelerators and on x86 that has instructions for it; NVIDIA's have from 8.0 on.

    Args:
      backend: jax's name of it, "cpu" or other.
      processor: its description, as in /proc/cpuinfo.
      capability: of an NVIDIA GPU, "7.5".
    """
    on_cpu = re.search(r"\b(avx512_bf16|amx_bf16)\b", processor)
    native = on_cpu if backend == "cpu" else not re.match(r"[1-7]\.", capability)
    return jnp.bfloat16 if native else jnp.float32

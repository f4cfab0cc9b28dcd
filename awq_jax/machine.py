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
    """Bytes that can still be taken without swapping, in this container; 0 where that cannot be told."""
    told = [n for n in (left_to_system(), left_to_container()) if n is not None]
    return max(1, min(told)) if told else 0


def left_to_system() -> int | None:
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def left_to_container(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that a container may still take, None where nothing bounds it; files that are cached give way."""
    try:
        most, taken = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = re.search(r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.M)
    except (OSError, ValueError):
        return None
    return most - taken + (int(cached[1]) if cached else 0)


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

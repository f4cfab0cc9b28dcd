"""Which GPU the kernels are made for."""

from __future__ import annotations

import functools as ft
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax

OLDEST = 75
TENSOR_CORES = 80
"""From which architecture on Triton multiplies on the tensor cores."""
_named: ContextVar[int | None] = ContextVar("awq_jax_target", default=None)


def architecture() -> int | None:
    """90 for compute capability 9.0: the one that `target` names, else of NVIDIA's GPU here; None without one."""
    if _named.get() is not None:
        return _named.get()
    if jax.default_backend() != "gpu":
        return None
    found = str(getattr(jax.local_devices()[0], "compute_capability", "")).replace(".", "")
    return int(found) if found.isdigit() else None


def device() -> str:
    """What the GPU that programs are made for is called; "sm_90" for one that `target` names, "" without one."""
    if _named.get() is not None:
        return f"sm_{_named.get()}"
    return jax.local_devices()[0].device_kind if jax.default_backend() == "gpu" else ""


def for_each_architecture(make: Callable[..., Any]) -> Any:
    """`make`, whose results are kept by its arguments and by the GPU that programs are made for.

    jax remembers what it has traced of a function, so each GPU needs functions of its own.
    """

    @ft.cache
    def made(arch: int | None, *args: Any) -> Any:
        del arch
        return make(*args)

    def of_this_gpu(*args: Any) -> Any:
        return made(architecture(), *args)

    of_this_gpu.cache_clear = made.cache_clear  # type: ignore[attr-defined]
    return of_this_gpu


MULTIPROCESSORS = {75: 40, 80: 108, 86: 84, 87: 16, 89: 128, 90: 132, 100: 148, 103: 148, 120: 170, 121: 48}
"""Of the GPU that most have of an architecture: what is taken for one that is not here."""


def multiprocessors() -> int:
    """How many programs the GPU runs beside each other, one each."""
    if _named.get() is None and (found := getattr(jax.local_devices()[0], "core_count", None)):
        return int(found)
    return MULTIPROCESSORS.get(architecture() or TENSOR_CORES, MULTIPROCESSORS[TENSOR_CORES])


@contextmanager
def target(architecture: int) -> Iterator[None]:
    """Within the block programs are made for a GPU that is not here, as 90 for an H100, say for jax.export.

    A function that was jitted and traced outside of it keeps its kernels: jit another, or call jax.clear_caches().

    Example:
      >>> with kernels.target(90):
      ...     exported = jax.export.export(jax.jit(f), platforms=["cuda"])(x, w)
    """
    token = _named.set(architecture)
    try:
        yield
    finally:
        _named.reset(token)

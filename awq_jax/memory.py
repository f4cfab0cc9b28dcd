"""Whether a computation fits: asked before it starts, as a system that runs out kills the process without a word."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend import core

from awq_jax.errors import InputError
from awq_jax.machine import free_memory


def check_memory(what: str, needed: int, remedy: str) -> None:
    """Passes if the machine has `needed` bytes, or if that cannot be told; accelerators say it themselves.

    Raises:
      InputError: it has not; starts with `what`.
    """
    free = free_memory() if jax.default_backend() == "cpu" else 0
    if 0 < free < needed:
        raise InputError(
            f"{what} takes about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: {remedy}."
        )


def size(n: float) -> str:
    """Bytes in a readable unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError


def nbytes_of(arrays: Iterable[Any]) -> int:
    """Bytes of arrays, or of what has their shapes and dtypes."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)


def to_be_read(params: Any) -> int:
    """Bytes of those params that are not in memory yet, of which jax.ShapeDtypeStructs stand there."""
    return nbytes_of(w for w in jax.tree.leaves(params) if isinstance(w, jax.ShapeDtypeStruct))


def matmul_bytes(f: Callable[..., Any], *args: Any) -> int:
    """What all matmuls of `f` give, in bytes: about what XLA takes beside arguments and results, within a third.

    Args:
      args: arrays, or jax.ShapeDtypeStructs.
    """
    return given_by_matmuls(jax.make_jaxpr(f)(*args).jaxpr)


def given_by_matmuls(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "ragged_dot_general"):
            total += nbytes_of(v.aval for v in eqn.outvars)
        total += sum(given_by_matmuls(getattr(sub, "jaxpr", sub)) for sub in core.jaxprs_in_params(eqn.params))
    return total

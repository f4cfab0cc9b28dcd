"""Compilation for tests: what runs once on tiny arrays should not be optimized for long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax


def quick_jit(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0}, **options)


@contextmanager
def quick_compilation() -> Iterator[None]:
    """Whatever is compiled inside the block is hardly optimized."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)

"""jit for tests: what runs once on tiny arrays should not be optimized for long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def quick_jit(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0}, **options)

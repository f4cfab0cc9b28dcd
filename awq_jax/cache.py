"""What stays in the user's cache from run to run."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def cache() -> Path:
    """Where it stays: $XDG_CACHE_HOME/awq_jax, ~/.cache/awq_jax without it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "awq_jax"


def keep_compiled_programs() -> None:
    """Let the next process start with what this one compiles, unless the user keeps such programs elsewhere."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

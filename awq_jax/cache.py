"""What stays in the user's cache from run to run."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import jax

from awq_jax.errors import InputError


def cache() -> Path:
    """Where it stays: $XDG_CACHE_HOME/awq_jax, ~/.cache/awq_jax without it.

    Raises:
      InputError: the user has no home either.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "awq_jax"
    except RuntimeError as e:
        raise InputError("There is no home folder to keep files in: set XDG_CACHE_HOME to a folder.") from e


def keep_compiled_programs() -> None:
    """Let the next process start with what this one compiles, unless the user keeps such programs elsewhere or has no
    place for them."""
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    with suppress(InputError, OSError):
        compiled = cache() / "compiled"
        compiled.mkdir(parents=True, exist_ok=True)
        if not os.access(compiled, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(compiled))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

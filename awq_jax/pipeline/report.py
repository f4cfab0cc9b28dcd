"""What stands beside a quantized model's weights: each site's errors, and the model card."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int

from awq_jax.errors import reading
from awq_jax.files import inside, parse_json
from awq_jax.formats import orbax
from awq_jax.formats.card import CARD, card
from awq_jax.formats.checkpoint import Checkpoint
from awq_jax.formats.written import size_of
from awq_jax.memory import size
from awq_jax.transforms.quantize import SiteReport
from awq_jax.transforms.recipe import Recipe

REPORT = "quantization_report.json"
T = TypeVar("T")


def write_report(
    folders: Mapping[str, Path],
    checkpoint: Checkpoint,
    recipe: Recipe,
    sites: Sequence[SiteReport],
    tokens: Int[np.ndarray, "n t"],
    more: Mapping[str, str],
) -> None:
    """Writes report and card into the folder of each format, whose weights are there.

    Args:
      checkpoint: the dense model.
      tokens: that it was calibrated on.
      more: further rows of the card's table.
    """
    for format, folder in folders.items():
        (folder / REPORT).write_text(json.dumps([asdict(site) for site in sites], indent=1))
        figures = {
            "size before": f"{size(checkpoint.nbytes)} ({size(in_16_bits(checkpoint))} in 16 bits)",
            "size now": size(size_of(folder)),
            "calibrated on": f"{len(tokens)} sequences of {np.shape(tokens)[1]} tokens",
            **more,
        }
        (folder / CARD).write_text(card(checkpoint.path, format, orbax.shown(recipe), figures, sites), "utf-8")


def in_16_bits(checkpoint: Checkpoint) -> int:
    """Bytes of a checkpoint's tensors with two for each number."""
    return sum(2 * math.prod(tensor.shape) for tensor in checkpoint.tensors.values())


def read_report(path: Path, of: Callable[[Any], T]) -> list[T]:
    """`of` each site that was quantized, as the report beside a checkpoint has it; none without a report.

    Raises:
      InputError: the report is none.
    """
    file = inside(path, REPORT) if path.is_dir() else None
    if file is None:
        return []
    with reading(f"{file} is no report of awq_jax", "delete it"):
        return [of(site) for site in parse_json(file) if site["spec"] is not None]

"""How close quantized models stay to the dense one: KL, top-1, perplexity; one row a recipe.

  python benchmarks/fidelity.py --calib calib.txt --texts news.txt novel.txt

The calibration text must not be one of the texts. Without --model: SmolLM2-135M-Instruct (see `awq-jax demo`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from common import opened, quantized_in_memory, save, with_params

from awq_jax.pipeline.score import score
from awq_jax.transforms.presets import PRESETS
from awq_jax.transforms.recipe import Recipe, Scales
from awq_jax.transforms.stream import Feed


@dataclass(frozen=True)
class Arguments:
    calib: tuple[str, ...] = ()
    """Calibration text, or several sources; the packaged text without it."""
    texts: tuple[Path, ...] = ()
    """Texts to score on."""
    model: str | None = None
    feed: Feed = "dense"
    """What a block is calibrated on, as in `awq-jax quantize`."""
    samples: int = 32
    seq_len: int = 512
    windows: int = 8
    length: int = 1024
    rows: tuple[str, ...] = ()
    """Only the rows whose name contains one of these; the share of RTN's KL needs its rtn row."""
    name: str = "fidelity"
    """Of the JSON file under benchmarks/results."""


def recipes() -> dict[str, tuple[str, Recipe]]:
    """Row -> (the round-to-nearest row it is compared with, recipe)."""
    rows: dict[str, tuple[str, Recipe]] = {}

    def add(kind: str, preset: str, *, scales: Scales, **k: Any) -> None:
        nearest = f"RTN {kind}"
        name = nearest if preset == "rtn" else f"{preset} {kind}{' folded' if scales == 'folded' else ''}"
        rows[name] = (nearest, replace(PRESETS[preset], scales=scales, **k))

    add("g64", "rtn", scales="beside", group_size=64)
    for preset in ("llm_awq", "autoawq", "llmcompressor", "fast", "default"):
        add("g64", preset, scales="folded", group_size=64)
    for preset in ("llm_awq", "default"):
        add("g64", preset, scales="beside", group_size=64)
    for kind, bits in (("g128", 4), ("W3 g128", 3)):
        add(kind, "rtn", scales="beside", bits=bits, group_size=128)
        add(kind, "default", scales="folded", bits=bits, group_size=128)
        add(kind, "default", scales="beside", bits=bits, group_size=128)
    return rows


def main(a: Arguments) -> None:
    checkpoint, dense, tokens, texts, reference = opened(a)
    source = " + ".join(a.calib) or "the packaged text"
    table = Table(title=f"{Path(a.model or checkpoint.path).name}: calibrated on {tokens.size} tokens of {source}")
    table.add_column("recipe")
    for column in ("text", "KL", "of RTN's KL removed", "top-1", "perplexity"):
        table.add_column(column, justify="right")
    result: dict[str, dict[str, dict[str, float]]] = {}
    for text, ids in texts.items():
        found = score(reference, ids)
        result.setdefault("dense", {})[text] = {"perplexity": found.perplexity}
        table.add_row("dense", text, "", "", "", f"{found.perplexity:.3f}")
    for row, (nearest, recipe) in recipes().items():
        if a.rows and not any(part in row for part in a.rows):
            continue
        # A recipe that asks for fewer sequences than the default one gets as much fewer of these.
        part = tokens[:: Recipe().samples // recipe.samples]
        params, _ = quantized_in_memory(checkpoint, part, recipe, feed=a.feed)
        model = with_params(dense, params)
        for text, ids in texts.items():
            found = score(model, ids, reference)
            entry = {"kl": found.kl, "top1": found.top1, "perplexity": found.perplexity}
            result.setdefault(row, {})[text] = entry
            if nearest in result:
                entry["removed"] = 1 - found.kl / result[nearest][text]["kl"]
            removed = f"{entry['removed']:.1%}" if "removed" in entry else ""
            cells = (f"{found.kl:.4f}", removed, f"{found.top1:.1%}", f"{found.perplexity:.3f}")
            table.add_row(row, text, *cells)
            print(row, text, *cells, file=sys.stderr, flush=True)
        save(a.name, {"calibration_tokens": int(tokens.size), "rows": result})
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

"""How close quantized models stay to the dense one: KL, top-1, perplexity; one row a recipe.

  python benchmarks/fidelity.py --calib calib.txt --texts news.txt novel.txt

The calibration text must not be one of the texts. Without --model: SmolLM2-135M-Instruct (see `awq-jax demo`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from common import Remembered, quantized_in_memory, save, with_params

from awq_jax.calib import calibration_tokens
from awq_jax.demo import fetch_smollm2
from awq_jax.evaluate import score, windows
from awq_jax.formats.checkpoint import open_checkpoint
from awq_jax.load import load
from awq_jax.presets import PRESETS


@dataclass(frozen=True)
class Arguments:
    calib: str | None = None
    """Calibration text; the packaged one without it."""
    texts: tuple[Path, ...] = ()
    """Texts to score on."""
    model: str | None = None
    samples: int = 32
    seq_len: int = 512
    windows: int = 8
    length: int = 1024
    rows: tuple[str, ...] = ()
    """Only the rows whose name contains one of these."""
    name: str = "fidelity"
    """Of the JSON file under benchmarks/results."""


def recipes() -> dict[str, tuple[str, object]]:
    """Row -> (the round-to-nearest row it is compared with, recipe)."""
    g = lambda preset, size=64, **k: replace(PRESETS[preset], group_size=size, **k)
    return {
        "RTN g64": ("RTN g64", g("rtn")),
        "llm_awq g64 folded": ("RTN g64", g("llm_awq", fold=True)),
        "autoawq g64 folded": ("RTN g64", g("autoawq", fold=True)),
        "llmcompressor g64 folded": ("RTN g64", g("llmcompressor", fold=True)),
        "fast g64 folded": ("RTN g64", g("fast", fold=True)),
        "default g64 folded": ("RTN g64", g("default", fold=True)),
        "default g64": ("RTN g64", g("default")),
        "best g64 folded": ("RTN g64", g("best", fold=True)),
        "best g64": ("RTN g64", g("best")),
        "RTN g128": ("RTN g128", g("rtn", 128)),
        "default g128 folded": ("RTN g128", g("default", 128, fold=True)),
        "default g128": ("RTN g128", g("default", 128)),
        "RTN W3 g128": ("RTN W3 g128", g("rtn", 128, bits=3)),
        "default W3 g128 folded": ("RTN W3 g128", g("default", 128, bits=3, fold=True)),
        "default W3 g128": ("RTN W3 g128", g("default", 128, bits=3)),
    }


def main(a: Arguments) -> None:
    path = a.model or str(fetch_smollm2())
    checkpoint, dense = open_checkpoint(path), load(path)
    tokens = calibration_tokens(a.calib, dense.tokenizer, samples=a.samples, seq_len=a.seq_len)
    texts = {t.stem: windows(t.read_text("utf-8"), dense.tokenizer, a.windows, a.length) for t in a.texts}
    reference = Remembered(dense)
    table = Table(title=f"{Path(path).name}: calibrated on {tokens.size} tokens of {a.calib or 'the packaged text'}")
    table.add_column("recipe")
    for column in ("text", "KL", "of RTN's KL removed", "top-1", "perplexity"):
        table.add_column(column, justify="right")
    result: dict[str, dict[str, dict[str, float]]] = {}
    for text, ids in texts.items():
        found = score(reference, ids)
        result.setdefault("dense", {})[text] = {"perplexity": found.perplexity}
        table.add_row("dense", text, "", "", "", f"{found.perplexity:.3f}")
    for row, (nearest, recipe) in recipes().items():
        if a.rows and not any(part in row for part in a.rows) and row not in ("RTN g64",):
            continue
        params, done = quantized_in_memory(checkpoint, tokens, recipe)
        model = with_params(dense, params)
        for text, ids in texts.items():
            found = score(model, ids, reference)
            entry = {"kl": found.kl, "top1": found.top1, "perplexity": found.perplexity}
            entry["seconds"] = sum(done.seconds.values())
            result.setdefault(row, {})[text] = entry
            removed = 1 - found.kl / result[nearest][text]["kl"] if nearest in result else float("nan")
            entry["removed"] = removed
            cells = (f"{found.kl:.4f}", f"{removed:.1%}", f"{found.top1:.1%}", f"{found.perplexity:.3f}")
            table.add_row(row, text, *cells)
            print(row, text, *cells, f"{entry['seconds']:.0f} s", file=sys.stderr, flush=True)
        save(a.name, {"calibration_tokens": int(tokens.size), "rows": result})
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

"""Every strategy on one model: KL and perplexity on text that calibration never saw, seconds of search, bytes.

  python benchmarks/strategies.py --calib calib.txt --texts news.txt novel.txt --kinds "W4 g64"

Statistics are taken once. Each row changes one choice of the default recipe, every site with a scale of its own.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from common import opened, save, with_params

from awq_jax.models import for_config
from awq_jax.pipeline.score import score
from awq_jax.pipeline.stream import Decoder, stream
from awq_jax.search import (
    Clip,
    Feedback,
    FeedbackGrid,
    Golden,
    Gradient,
    Grid,
    Importance,
    Joint,
    LearnedClip,
    Signed,
    no_clip,
    to_nearest,
)
from awq_jax.transforms.calibrate import Calibration
from awq_jax.transforms.presets import PRESETS
from awq_jax.transforms.quantize import quantize
from awq_jax.transforms.recipe import Recipe
from awq_jax.weights.tensor import dequantize, is_quantized

KINDS = {"W4 g64": (4, 64), "W4 g128": (4, 128), "W3 g128": (3, 128), "W3 g64": (3, 64)}
TENTHS = tuple(i / 10 for i in range(10))
FIFTHS = tuple(i / 5 for i in range(6))


def strategies() -> dict[str, Recipe]:
    """The paper's scale and clip with one choice changed, then with error feedback."""
    plain = Recipe(scale=Grid(TENTHS), clip=Clip(), rounding=to_nearest)
    scales: dict[str, Any] = {
        "grid": Grid(TENTHS),
        "grid, root mean square": Grid(TENTHS, statistic="rms"),
        "grid, a^r / w^(1-r)": Grid(TENTHS, duo="always"),
        "grid, a^r / w^p": Grid(FIFTHS, duo="any"),
        "golden section": Golden(),
        "joint with clip": Joint(),
        "gradient": Gradient(),
    }
    clips: dict[str, Any] = {
        "no clip": no_clip,
        "both ends apart": Clip(ends=True),
        "importance": Importance(),
        "learned clip": LearnedClip(),
    }
    roundings: dict[str, Any] = {
        "feedback": Feedback(sweeps=0, refit=False),
        "feedback, refit": Feedback(sweeps=0),
        "feedback, refit, descent": Feedback(),
        "feedback, shrunk by 0.05": Feedback(shrink=0.05),
        "signed gradients": Signed(),
    }
    rows = {"round to nearest": PRESETS["rtn"]}
    rows |= {f"scale: {name}": replace(plain, scale=s) for name, s in scales.items()}
    rows |= {f"clip: {name}": replace(plain, clip=c) for name, c in clips.items()}
    rows |= {f"rounding: {name}": replace(plain, rounding=r) for name, r in roundings.items()}
    rows |= {"scale: feedback grid (default)": Recipe(), "fast": PRESETS["fast"]}
    rows |= {"feedback grid, gradient": Recipe(scale=Gradient(start=FeedbackGrid()))}
    rows |= {"feedback grid, learned clip": Recipe(clip=LearnedClip())}
    return rows


@dataclass(frozen=True)
class Arguments:
    calib: tuple[str, ...] = ()
    """Calibration text, or several sources; the packaged text without it."""
    texts: tuple[Path, ...] = ()
    """Texts to score on."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Widths and groups, such as "W4 g64"."""
    rows: tuple[str, ...] = ()
    """Only the rows whose name contains one of these."""
    model: str | None = None
    samples: int = 32
    seq_len: int = 512
    windows: int = 4
    length: int = 1024
    name: str = "strategies"
    """Of the JSON file under benchmarks/results."""


def calibrations(model: Decoder, tokens: Any) -> list[tuple[Any, Calibration]]:
    """Params and statistics of every block, whole Gram matrices."""
    found: list[tuple[Any, Calibration]] = []

    def keep(name: str, params: Any, calibration: Calibration, recipe: Recipe) -> tuple[Any, tuple[()]]:
        found.append((params, calibration))
        return params, ()

    nothing = lambda part, params: None
    stream(model, tokens, Recipe(gram_block=None), nothing, dtype=model.config.dtype, solve=keep)
    return found


def main(a: Arguments) -> None:
    checkpoint, dense, tokens, texts, reference = opened(a)
    module = for_config(checkpoint.config)
    blocks = calibrations(Decoder(module, module.Config.from_hf(checkpoint.config), checkpoint.read), tokens)
    columns = ["kind", "strategy", "seconds", "MB", *(f"{of} {text}" for text in texts for of in ("KL", "perplexity"))]
    table, result = Table(*columns, title=f"Strategies, {tokens.size} tokens"), []
    for kind in a.kinds:
        bits, group_size = KINDS[kind]
        for name, recipe in strategies().items():
            if a.rows and not any(part in name for part in a.rows):
                continue
            recipe = replace(recipe, bits=bits, group_size=group_size)
            jax.block_until_ready(quantize(*blocks[0], recipe)[0])
            start = time.perf_counter()
            parts = [jax.block_until_ready(quantize(*block, recipe)[0]) for block in blocks]
            seconds = time.perf_counter() - start
            leaves = jax.tree.leaves(parts, is_leaf=is_quantized)
            mb = sum(w.nbytes for w in leaves if is_quantized(w)) / 1e6
            layers = {f"layers_{i}": p for i, p in enumerate(dequantize(parts))}
            model = with_params(dense, dense.outer | layers)
            scores = {text: score(model, ids, reference) for text, ids in texts.items()}
            entry = {text: {"kl": s.kl, "perplexity": s.perplexity, "top1": s.top1} for text, s in scores.items()}
            result.append({"kind": kind, "strategy": name, "seconds": seconds, "mb": mb, "scores": entry})
            cells = [
                f"{x:.4f}" if of == "kl" else f"{x:.2f}" for e in entry.values() for of, x in e.items() if of != "top1"
            ]
            table.add_row(kind, name, f"{seconds:.1f}", f"{mb:.1f}", *cells)
            print(kind, name, f"{seconds:.1f}", *cells, file=sys.stderr, flush=True)
            save(a.name, {"calibration_tokens": int(tokens.size), "rows": result})
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

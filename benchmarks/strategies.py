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
from flax.traverse_util import unflatten_dict
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from common import opened, save, with_params

from awq_jax.models import for_config
from awq_jax.pipeline.decoder import as_function, chunks, lazy_params
from awq_jax.pipeline.score import score
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
from awq_jax.tracing.program import slot
from awq_jax.tracing.segments import Segment, segments
from awq_jax.transforms.calibrate import Calibration
from awq_jax.transforms.presets import PRESETS
from awq_jax.transforms.quantize import quantize
from awq_jax.transforms.recipe import Recipe
from awq_jax.transforms.stream import stream
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


Piece = tuple[Segment, Any, Calibration]


def pieces(config: Any, params: Any, tokens: Any) -> list[Piece]:
    """Every segment with its params and statistics, whole Gram matrices."""
    fn, given, tokens = as_function(config, params, tokens)
    batches, found = chunks(tokens), list[Piece]()
    todo = iter(segments(fn, given, *batches[0]).segments)

    def keep(params: Any, calibration: Calibration, recipe: Recipe) -> tuple[Any, tuple[()]]:
        found.append((next(todo), params, calibration))
        return params, ()

    stream(fn, given, batches, Recipe(gram_block=None), lambda name, leaf: None, solve=keep)
    return found


def layers(found: list[Piece], quantized: list[Any]) -> dict[str, Any]:
    """The params of the layers, made dense again."""
    named = {
        str(param): dequantize(part[slot(k)])
        for (segment, *_), part in zip(found, quantized, strict=True)
        for k, param in enumerate(segment.params)
        if str(param).startswith("layers_")
    }
    return unflatten_dict(named, sep="/")


def main(a: Arguments) -> None:
    checkpoint, dense, tokens, texts, reference = opened(a)
    family = for_config(checkpoint.config)
    config = family.config(checkpoint.config)
    found = pieces(config, lazy_params(checkpoint, family, config), tokens)
    solved = lambda piece, recipe: jax.block_until_ready(quantize(piece[1], piece[2], recipe)[0])
    columns = ["kind", "strategy", "seconds", "MB", *(f"{of} {text}" for text in texts for of in ("KL", "perplexity"))]
    table, result = Table(*columns, title=f"Strategies, {tokens.size} tokens"), []
    for kind in a.kinds:
        bits, group_size = KINDS[kind]
        for name, recipe in strategies().items():
            if a.rows and not any(part in name for part in a.rows):
                continue
            recipe = replace(recipe, bits=bits, group_size=group_size)
            for piece in found[:3]:  # compiles
                solved(piece, recipe)
            start = time.perf_counter()
            parts = [solved(piece, recipe) for piece in found]
            seconds = time.perf_counter() - start
            leaves = jax.tree.leaves(parts, is_leaf=is_quantized)
            mb = sum(w.nbytes for w in leaves if is_quantized(w)) / 1e6
            model = with_params(dense, dense.outer | layers(found, parts))
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

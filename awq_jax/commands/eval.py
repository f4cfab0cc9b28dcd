"""`awq-jax eval`: how well models predict texts, and how far they are from the one they were made of."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from awq_jax.commands.figures import figures_table, worst_table
from awq_jax.commands.flags import one_of, one_or_more
from awq_jax.commands.progress import progress_bar
from awq_jax.commands.tables import console, say

Convention = Literal["own", "wikitext2", "llama.cpp", "transformers"]
SHOWN = 5
"""Of the worst tokens."""


@dataclass(frozen=True)
class Eval:
    """Perplexity of texts; with --against also KL and how often the likeliest tokens are those of that model."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Any checkpoint, dense or quantized."""
    texts: Annotated[Positional[tuple[str, ...]], arg(metavar="TEXT...")]
    """Texts, files of chats or texts (of chats only what the model says counts), datasets of the hub as
    ID[:CONFIG[:SPLIT]], or wikitext-2; best ones that calibration never saw."""
    against: Annotated[str | None, arg(aliases=("--dense",))] = None
    """The model to compare with."""
    also: Annotated[tuple[str, ...], one_or_more()] = ()
    """More checkpoints, each a row of the table."""
    convention: Annotated[Convention, one_of(Convention)] = "own"
    """How texts become windows: wikitext2 as the papers on quantization do (windows of 2048 tokens, all of the text),
    llama.cpp and transformers as these; own with the numbers below."""
    windows: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 8; all of chats)")] = None
    """Windows from the start of each text."""
    length: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 1024)")] = None
    """Tokens a window."""
    stride: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: --length)")] = None
    """Tokens from one window's start to the next: with fewer than its length a token has more before it."""
    json: bool = False
    """Print JSON instead of tables."""

    def run(self) -> None:
        from awq_jax.pipeline.evaluate import evaluate

        with progress_bar() as progress:
            scores = evaluate(
                [self.model, *self.also],
                self.texts,
                self.against,
                convention=self.convention,
                windows=self.windows,
                length=self.length,
                stride=self.stride,
                told=(lambda line: print(line, file=sys.stderr)) if self.json else say,
                progress=progress,
            )
        if self.json:
            settings = {name: getattr(self, name) for name in ("against", "convention", "windows", "length", "stride")}
            told = {name: {text: asdict(score) for text, score in of.items()} for name, of in scores.items()}
            print(json.dumps({"settings": settings, "scores": told}, indent=1))
            return
        console().print(figures_table(scores))
        for name, by_text in scores.items():
            for text, score in by_text.items():
                if score.worst:
                    console().print(worst_table(name, text, score.worst[:SHOWN]))

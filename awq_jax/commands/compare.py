"""`awq-jax compare`: prompts through a model and what was made of it, side by side on a page; a gate for CI."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from awq_jax.commands.figures import compared_table
from awq_jax.commands.progress import progress_bar
from awq_jax.commands.tables import console, say


@dataclass(frozen=True)
class Compare:
    """Ask a model and what was made of it the same prompts, and show the answers side by side on a page."""

    base: Annotated[Positional[str], arg(metavar="BASE")]
    """The model that the others are compared with."""
    quant: Annotated[Positional[tuple[str, ...]], arg(metavar="QUANT...")]
    """Checkpoints to compare; also names or digests of some that the store has met and that are gone."""
    prompts: Path
    """File of prompts, as JSON lines or the like: prompt (or messages, or text), and maybe name, tags, system,
    and checks of the answer: contains, regex, json, expected."""
    out: Annotated[Path | None, arg(aliases=("-o",), metavar="FOLDER", help_behavior_hint="(default: no report)")] = (
        None
    )
    """Folder to write: index.html, one page that needs no network, and junit.xml."""
    store: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: beside the prompts)")] = None
    """SQLite file that keeps all results; what it has is not run again."""
    gate: str | None = None
    """Limits, as kl=0.05,top1=0.97,ppl=1.05,checks=0: beyond one of them the exit code is 1."""
    max_new_tokens: int = 128
    """An answer's tokens at most."""
    temperature: float = 0.7
    """Of the answer that is sampled beside the greedy one; 0 leaves it out."""
    seed: int = 0
    """Of what is sampled."""
    overwrite: bool = False
    """Replace the report of an earlier run at --out, and nothing else."""

    def run(self) -> None:
        from awq_jax.formats.written import check_destination, written_whole
        from awq_jax.pipeline.compare import compare
        from awq_jax.records.gate import judge, parse_gate
        from awq_jax.records.junit import junit
        from awq_jax.records.page import page

        limits = parse_gate(self.gate) if self.gate is not None else {}
        kept = self.store or self.prompts.with_suffix(".runs.sqlite")
        inputs = (self.base, *self.quant, self.prompts, kept)
        if self.out is not None:
            check_destination(self.out, overwrite=self.overwrite, inputs=inputs)
        with progress_bar() as progress:
            found = compare(
                self.base,
                self.quant,
                self.prompts,
                kept,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                seed=self.seed,
                told=say,
                progress=progress,
            )
        verdicts = judge(found, limits)
        console().print(compared_table(found))
        if self.out is not None:
            with written_whole(self.out, overwrite=self.overwrite, inputs=inputs) as folder:
                (folder / "index.html").write_text(page(found, verdicts), "utf-8")
                (folder / "junit.xml").write_text(junit(found, verdicts), "utf-8")
            say(f"Wrote {self.out / 'index.html'}.")
        for verdict in verdicts:
            say(f"{'pass' if verdict.passed else 'FAIL'}  {verdict}")
        if not all(verdict.passed for verdict in verdicts):
            sys.exit(1)

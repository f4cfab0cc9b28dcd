"""How far a long call is, on the error stream: bars in terminals and notebooks, now and then a line elsewhere."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Told = Callable[[str, int, int], None]
"""`(stage, done, total)`"""

SECONDS = 30.0
"""Between two lines in a log."""


@contextmanager
def progress_bar() -> Iterator[Told]:
    """A function to call with a stage, steps done and steps in all; what it draws is gone with the block.

    Example:
      >>> with awq.progress_bar() as progress:
      ...     awq.quantize_checkpoint("model", "out", progress=progress)
    """
    stderr = Console(stderr=True)
    # rich draws in notebooks through ipywidgets alone.
    drawn = importlib.util.find_spec("ipywidgets") if stderr.is_jupyter else stderr.is_terminal
    if not drawn:
        yield lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # What goes to a file is none of the terminal's business.
    with Progress(*columns, console=stderr, transient=True, redirect_stdout=sys.stdout.isatty()) as live:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                # A single step has no end that could be told: its bar pulses.
                tasks[stage] = live.add_task(stage, total=total if total > 1 else None)
            live.update(tasks[stage], completed=done, total=total if total > 1 or done else None)

        yield progress


def lines() -> Told:
    """Writes a line where the last one is `SECONDS` old, so that a log shows that something happens."""
    start = last = time.monotonic()

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= SECONDS and (total, done) != (1, 1):
            last = now
            steps = f" {done} of {total}" if total > 1 else ""
            print(f"{now - start:.0f} s: {stage}{steps}", file=sys.stderr, flush=True)

    return progress

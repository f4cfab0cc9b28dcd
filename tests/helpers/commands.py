"""Runs `awq-jax` inside of the test's process and takes its tables apart."""

from __future__ import annotations

import contextlib
import io
import math
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from awq_jax.commands import cli, progress


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code and what it printed."""

    code: Any
    out: str
    err: str

    @property
    def rows(self) -> dict[str, list[str]]:
        """The cells of every row of every table, by the first of them."""
        lines = [line for line in self.out.splitlines() if line.startswith("│")]
        cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
        return {first: rest for first, *rest in cells}


def run(*args: object) -> Done:
    """`awq-jax ARGS`, on a terminal of 100 columns."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["awq-jax", *map(str, args)])
        patch.setenv("COLUMNS", "100")
        # Lines for logs depend on how busy the machine is.
        patch.setattr(progress, "SECONDS", math.inf)
        # It would stay on for the tests that count compilations.
        patch.setattr(cli, "keep_compiled_programs", lambda: None)
        try:
            cli.main()
        except SystemExit as e:
            code = e.code
    return Done(code, out.getvalue(), err.getvalue())

"""What a step finds on a GPU: rows with their goals, written as they come, and a short table last."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
from common import machine
from jax import lax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from awq_jax.kernels import target
from awq_jax.kernels.triton import launch
from awq_jax.kernels.triton import matmul as triton
from awq_jax.transforms.tune import Chain, distinct, timed


@dataclass(frozen=True)
class Row:
    """One finding. `goal` is the least that is wanted, or with `most` the most; `why` says why nothing was found."""

    what: str
    found: float | str | None = None
    unit: str = ""
    goal: float | None = None
    most: bool = False
    why: str = ""

    @property
    def verdict(self) -> str:
        if self.why:
            return self.why
        if self.goal is None or not isinstance(self.found, float | int):
            return ""
        return "met" if (self.found <= self.goal if self.most else self.found >= self.goal) else "missed"

    def cells(self) -> tuple[str, ...]:
        found = f"{self.found:.4g}" if isinstance(self.found, float) else "" if self.found is None else str(self.found)
        goal = "" if self.goal is None else f"{'<=' if self.most else '>='} {self.goal:g}"
        return self.what, found, self.unit, goal, self.verdict


@dataclass(frozen=True)
class Record:
    """A step's findings in `folder`/GPU.json, beside those of the others; `details` are what plots are made of."""

    step: str
    folder: Path
    end: float = float("inf")
    toy: bool = False
    rows: list[Row] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    @property
    def file(self) -> Path:
        name = "toy" if self.toy else jax.devices()[0].device_kind
        return self.folder / f"{re.sub('[^a-z0-9]+', '_', name.lower()).strip('_')}.json"

    def attempt(self, what: str, find: Callable[[], Iterable[Row]]) -> None:
        """Adds what `find` yields; where it fails, or the step's time is over, a row that says so."""
        if self.over():
            return self.add(Row(what, why="not reached: the step's time was over"))
        # Whatever goes wrong on a machine that this never ran on costs one row.
        try:
            for row in find():
                self.add(row)
        except Exception as e:
            self.add(Row(what, why=reason(e)))

    def over(self) -> bool:
        return time.monotonic() > self.end

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(f"{time.monotonic() - self.start:5.0f} s", *filter(None, row.cells()), sep="  ", flush=True)
        self.write()

    def write(self, **more: Any) -> None:
        """The file with this step's part renewed; a process that is killed meanwhile leaves the old one."""
        known = self.read()
        own = {"machine": machine(), "rows": [asdict(r) | {"verdict": r.verdict} for r in self.rows]}
        known = known | more | {self.step: own | {"details": self.details}}
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.file.with_suffix(".part")
        scratch.write_text(json.dumps(known, indent=1) + "\n")
        scratch.rename(self.file)

    def read(self) -> dict[str, Any]:
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    def ceilings(self) -> dict[str, float]:
        """What a copy and a bfloat16 matmul reach here: of an earlier step, else measured now."""
        found = self.read().get("ceilings") or ceilings(self.toy)
        self.write(ceilings=found)
        return found

    def table(self) -> None:
        """Rows with a goal or a trouble, and those that a step of few rows has."""
        shown = [row for row in self.rows if len(self.rows) <= 24 or row.verdict]
        table = Table("", "found", "", "goal", "", title=f"{self.step}: {self.file.stem}")
        for row in shown:
            table.add_row(*map(escape, row.cells()))
        Console(width=118).print(table)


def reason(e: BaseException) -> str:
    """An error in one line: its first, and its last, which of a longer one says most."""
    lines = f"{type(e).__name__}: {e}".strip().splitlines()
    return " ... ".join(dict.fromkeys((lines[0][:200], lines[-1].strip()[:200])))


def ceilings(toy: bool) -> dict[str, float]:
    """Bytes/s of a copy, read plus written, and FLOP/s of a bfloat16 matmul, on random data."""
    n, size, rounds = (2**16, 128, 2) if toy else (2**29, 8192, 16)
    a = jax.random.normal(jax.random.key(0), (n,), jnp.bfloat16)
    copy = jax.jit(lambda a, k: lax.fori_loop(0, rounds, lambda _, a: lax.optimization_barrier(a) * k, a))
    weights = distinct(size, size, lambda w: w)[:2]
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = Chain.of(jnp.matmul, x, weights).compiled().seconds()
    return {
        "bytes_per_s": 4 * n * rounds / timed(lambda: copy(a, jnp.bfloat16(-1))),
        "flop_per_s": 2 * size**3 / product,
    }


@contextmanager
def toy_gpu() -> Iterator[None]:
    """A CPU in the place of a GPU: Triton's interpreter runs the kernels, and everything once."""
    sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))
    import interpreted

    def once(call: Callable[[], Any], repeats: int = 1) -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    few = patch.multiple(sys.modules[Chain.__module__], SECONDS=0.0, ROTATED=0, timed=once)
    here = patch.object(launch, "missing", lambda: None)
    with few, here, patch.object(triton, "launch", interpreted.launch), target(90):
        yield

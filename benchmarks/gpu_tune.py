"""Step "tune": the fastest tiling of each shape and number of rows into the package's kernels/tilings/table.json."""

from __future__ import annotations

import functools as ft
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_kernels import LLAMA_8B
from gpu_record import Record, Row

from awq_jax import kernels
from awq_jax.kernels.gpu import architecture
from awq_jax.kernels.tilings import table
from awq_jax.kernels.tilings.table import Case, Tiling
from awq_jax.transforms.tune import distinct, timings
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import SCALE_DTYPE, in_tiles, round_to_nearest

TABLE = Path(kernels.__file__).with_name("tilings") / "table.json"
ROWS = (1, 1024, 64, 4096, 16, 256, 4, 32, 128, 512, 2, 8, 2048)
"""Decoding and a prefill first, then what lies between them."""


def tuned(case: Case, weights: list[Any], record: Record, keep: bool) -> Iterator[Row]:
    what, before = f"{case.k} x {case.n}, {case.m} rows", table.rule(case.arch, case.dtype, case.group, case.m, case.n)
    found = timings(case, before, weights)
    us = {str(tiling): t * 1e6 for tiling, t in found.seconds.items()}
    failed = {str(tiling): why.splitlines()[0] for tiling, why in found.failed.items()}
    record.details.append({"case": asdict(case), "us": us, "failed": failed})
    if not found.best:
        raise RuntimeError(f"{before}, which serves without tuning, did not run: {found.failed.get(before)}")
    if keep:
        write_row(asdict(case), found.best)
    t, shape = found.best, f"{found.best.bm} x {found.best.bn} x {found.best.kb}"
    yield Row(f"{what}: {t.kernel} {shape}, {t.warps} warps, {t.stages} stages", found.gain, "x the rule's")
    if failed:
        yield Row(f"{what}: tilings that do not run", f"{len(failed)} of {len(failed) + len(us)}")


def write_row(case: dict[str, Any], best: Tiling) -> None:
    """`best` as the table's measured tiling of a case, in the place of what was there."""
    data = json.loads(TABLE.read_text())
    others = [row for row in data["measured"] if any(row[key] != value for key, value in case.items())]
    data["measured"] = [*others, case | asdict(best)]
    lines = {key: ",\n".join(f"  {json.dumps(row)}" for row in data[key]) for key in ("measured", "untimed", "rule")}
    parts = [f' "comment": {json.dumps(data["comment"])}'] + [f' "{key}": [\n{rows}\n ]' for key, rows in lines.items()]
    TABLE.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    table.timed.cache_clear()


def run(record: Record) -> None:
    """A case is written as soon as it is timed; a toy's times are not."""
    arch = architecture()
    if arch is None:
        record.add(Row("tilings", why="no NVIDIA GPU is here"))
        return
    packed = lambda w: in_tiles(round_to_nearest(w, QuantSpec(4, 128), steps=SCALE_DTYPE))
    weights = ft.cache(lambda k, n: distinct(k, n, packed))
    for m in (16,) if record.toy else ROWS:
        for k, n in ((128, 32),) if record.toy else LLAMA_8B:
            case = Case(arch, "bfloat16", 128, m, k, n)
            what = f"{k} x {n}, {m} rows"
            record.attempt(what, lambda case=case: tuned(case, weights(case.k, case.n), record, not record.toy))

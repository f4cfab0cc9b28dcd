"""Sizes of tiles by GPU, dtype, group and shape: data in table.json, read once, nothing tuned at run time."""

from __future__ import annotations

import functools as ft
import json
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 2**31


@dataclass(frozen=True)
class Tiling:
    """What a program of a kernel owns: bm rows of x, bn columns; kb blocks of 128 rows at once (decode)."""

    kernel: str
    bm: int
    bn: int
    warps: int
    stages: int
    kb: int = 0


@dataclass(frozen=True)
class Row:
    """A tiling, and the cases it is for: architecture and group at least these, rows of x at most m."""

    tiling: Tiling
    arch: int
    group: int
    m: int = UNLIMITED
    exact: tuple[int, str, int, int, int, int] | None = None


@ft.cache
def rows() -> tuple[Row, ...]:
    """The table; a measured row holds only for the arch, dtype, group, m, k and n it was measured at."""
    data = json.loads(Path(__file__).with_name("table.json").read_text())
    return tuple(_row(r, measured=True) for r in data["measured"]) + tuple(_row(r) for r in data["rule"])


def _row(r: dict, measured: bool = False) -> Row:
    tiling = Tiling(r["kernel"], r["bm"], r["bn"], r["warps"], r["stages"], r.get("kb", 0))
    exact = tuple(r[key] for key in ("arch", "dtype", "group", "m", "k", "n")) if measured else None
    return Row(tiling, r["arch"], r["group"], r.get("m", UNLIMITED), exact)


def power_of_two(m: int) -> int:
    """The smallest one that is at least m: what m rows are looked up as."""
    return 1 << max(0, m - 1).bit_length()


def tiling(arch: int | None, dtype: str, group: int, m: int, k: int, n: int) -> Tiling:
    """The tiling for x (m, k) and a weight (k, n); without a GPU that of the oldest one that has a kernel."""
    arch = arch or 80
    for row in rows():
        if row.exact == (arch, dtype, group, power_of_two(m), k, n):
            return row.tiling
        if row.exact is None and arch >= row.arch and group >= row.group and m <= row.m:
            return row.tiling
    raise NotImplementedError(f"no tiling for sm_{arch}, groups of {group}, {m} rows")


def grouped_tiling(arch: int | None, dtype: str, group: int, m: int, k: int, n: int) -> Tiling:
    """The tiling for ragged groups of some m rows each, which only the kernel of many rows has."""
    found = tiling(arch, dtype, group, max(m, 33), k, n)
    return Tiling("ragged", 16, 64, 4, 4) if m <= 16 else found

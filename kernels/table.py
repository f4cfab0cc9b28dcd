"""Sizes of tiles by GPU, dtype, group and shape: data, read once. Nothing is tuned at run time.

table.json comes with the package. What `awq_jax.tune` measured on this user's GPUs is in the user's cache and goes
first.
"""

from __future__ import annotations

import functools as ft
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from awq_jax.cache import cache
from awq_jax.kernels.gpu import TENSOR_CORES

TRITON = ("decode", "tile", "gemv")
KERNELS = (*TRITON, "mosaic", "dense")
UNLIMITED = 2**31
SHARED = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
"""KiB of shared memory that a program may take, by architecture."""


@dataclass(frozen=True)
class Tiling:
    """What a program of a kernel owns: bm rows of x, bn columns; kb blocks of 128 rows at once (decode, gemv).

    The kernel "mosaic" is the one of mosaic_kernels.py; "dense" is none: XLA multiplies with the dense weight.
    """

    kernel: str
    bm: int = 0
    bn: int = 0
    warps: int = 0
    stages: int = 0
    kb: int = 0

    def shared(self, arch: int) -> int:
        """Bytes of shared memory, or a little more: what is read ahead of codes and of x in 2 bytes.

        The tensor cores of sm_90 and sm_100 read x from there, so its part of the round that is multiplied stays too.
        """
        if self.kernel == "mosaic":
            result, per_column = 32 * 1024, 3
            return self.stages * (256 * self.bm + (64 + per_column) * self.bn) + result + 1024
        blocks, ahead = max(self.kb, 1), self.stages - 1
        stays = self.kernel in ("tile", "ragged") and 90 <= arch < 120
        return blocks * (ahead * 64 * self.bn + (ahead + stays) * 256 * self.bm) + 1024

    def fits(self, arch: int) -> bool:
        return self.shared(arch) <= limit(arch)


@dataclass(frozen=True)
class Case:
    """x (m, k) of a dtype times a weight (k, n) in groups, on a GPU of an architecture."""

    arch: int
    dtype: str
    group: int
    m: int
    k: int
    n: int


@dataclass(frozen=True)
class Row:
    """A tiling, and the cases it is for: architecture, group and columns at least these, rows of x at most m.

    Or one case alone, which was measured.
    """

    tiling: Tiling
    arch: int
    group: int
    m: int = UNLIMITED
    n: int = 0
    exact: Case | None = None


def limit(arch: int) -> int:
    """Bytes of shared memory that a program may take; where that is not known, what the smallest take."""
    return SHARED.get(arch, min(SHARED.values())) * 1024


@ft.cache
def rows() -> tuple[Row, ...]:
    """What this user measured, then the package's table; a measured row holds only for the case it was measured at."""
    data = _data()
    measured = [*remembered(), *(_row(r, measured=True) for r in data["measured"])]
    return (*measured, *(_row(r) for r in data["rule"]))


@ft.cache
def untimed() -> tuple[Row, ...]:
    """Kernels that no GPU has timed yet, for who asks for them by name."""
    return tuple(_row(r) for r in _data()["untimed"])


def _data() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("table.json").read_text())


def _row(r: Mapping[str, Any], measured: bool = False) -> Row:
    tiling = Tiling(**{field.name: r[field.name] for field in fields(Tiling) if field.name in r})
    exact = Case(**{field.name: r[field.name] for field in fields(Case)}) if measured else None
    return Row(tiling, r["arch"], r["group"], r.get("m", UNLIMITED), r.get("n", 0), exact)


def users_file() -> Path:
    """Where the tilings that this user measured are, a row a line."""
    return cache() / "tilings.jsonl"


def remembered() -> tuple[Row, ...]:
    """This user's rows, the newest first."""
    file = users_file()
    try:
        lines = file.read_text().splitlines() if file.exists() else []
        found = tuple(_row(json.loads(line), measured=True) for line in lines)
    except (OSError, ValueError, TypeError, KeyError) as e:
        warnings.warn(f"{file} holds something else than tilings ({type(e).__name__}: {e}): delete it.", stacklevel=2)
        return ()
    return tuple(row for row in reversed(found) if row.tiling.kernel in KERNELS)


def remember(case: Case, tiling: Tiling) -> None:
    """From now on this user's programs take this tiling for this case."""
    users_file().parent.mkdir(parents=True, exist_ok=True)
    with users_file().open("a") as file:
        file.write(json.dumps(asdict(case) | asdict(tiling)) + "\n")
    rows.cache_clear()


def power_of_two(m: int) -> int:
    """The smallest one that is at least m: what m rows are looked up as."""
    return 1 << max(0, m - 1).bit_length()


def tiling(arch: int, dtype: str, group: int, m: int, k: int, n: int, *, among: Sequence[str] = KERNELS) -> Tiling:
    """The tiling for x (m, k) and a weight (k, n), among these kernels.

    Raises:
      NotImplementedError: too many rows of a dtype, or on a GPU, for which there are no tensor cores.
    """
    on_tensor_cores = arch >= TENSOR_CORES and dtype != "float32"
    for row in rows():
        if row.tiling.kernel not in among:
            continue
        if row.exact == Case(arch, dtype, group, power_of_two(m), k, n):
            return row.tiling
        at_least = arch >= row.arch and group >= row.group and n >= row.n
        fits = on_tensor_cores == (row.tiling.kernel != "gemv") and row.tiling.fits(arch)
        if row.exact is None and at_least and m <= row.m and fits:
            return row.tiling
    most = max(row.m for row in rows() if row.tiling.kernel == "gemv")
    raise NotImplementedError(
        f"more than {most} rows of {dtype} on sm_{arch} would need tensor cores that take them{remedy(arch)}"
    )


def remedy(arch: int) -> str:
    """What to do where a kernel needs tensor cores."""
    return ": cast x to bfloat16" if arch >= TENSOR_CORES else ""


def splits(programs: int, blocks: int, multiprocessors: int) -> int:
    """Into how many parts K is cut where there are too few programs for one on each multiprocessor.

    A part has 4 blocks of K or more, so that what is read ahead is read at all. Each costs a float32 of every result,
    written and read.
    """
    return max(1, min(round(multiprocessors / programs), blocks // 4))


def mosaic_tiling(m: int) -> Tiling:
    """The tiling of the kernel in Pallas Mosaic GPU for m rows."""
    return next(row.tiling for row in untimed() if m <= row.m)


def kernel_tiling(arch: int, dtype: str, group: int, m: int, k: int, n: int) -> Tiling:
    """The tiling of a Triton kernel, also where the table thinks something else to be faster."""
    most = max(row.m for row in rows() if row.tiling.kernel == "tile" and row.exact is None)
    return tiling(arch, dtype, group, min(m, most), k, n, among=TRITON)


def grouped_tiling(arch: int, dtype: str, group: int, m: int, k: int, n: int) -> Tiling:
    """The tiling for ragged groups of some m rows each, which only the kernel of many rows has."""
    found = kernel_tiling(arch, dtype, group, max(m, 33), k, n)
    return Tiling("ragged", 16, 64, 4, 4) if m <= 16 else found

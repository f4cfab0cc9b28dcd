"""Sizes of tiles by GPU, dtype, group and shape: data, read once. Nothing is tuned at run time.

table.json comes with the package. What `awq_jax.tune` measured on this user's GPUs is in the user's cache and goes
first.
"""

from __future__ import annotations

import functools as ft
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from awq_jax.cache import cache
from awq_jax.kernels.gpu import TENSOR_CORES, device

TRITON, MOSAIC, DENSE = ("decode", "tile", "gemv"), "mosaic", "dense"
KERNELS = (*TRITON, MOSAIC, DENSE)
UNLIMITED = 2**31
SHARED = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
"""KiB of shared memory that a program may take, by architecture."""


@dataclass(frozen=True)
class Tiling:
    """What a program of a kernel owns: bm rows of x, bn columns; kb blocks of 128 rows at once (decode, gemv).

    The kernel "mosaic" is the one of mosaic/; "dense" is none: XLA multiplies with the dense weight.
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
        if self.kernel == MOSAIC:
            return self.stages * self.round_on_hopper(per_column=3) + 32 * 1024 + 1024
        blocks, ahead = max(self.kb, 1), self.stages - 1
        stays = self.kernel in ("tile", "ragged") and 90 <= arch < 120
        return blocks * (ahead * 64 * self.bn + (ahead + stays) * 256 * self.bm) + 1024

    def round_on_hopper(self, per_column: int) -> int:
        """Bytes that the kernel "mosaic" copies for a block of rows of the weight, `per_column` of scales and zeros."""
        return 256 * self.bm + (64 + per_column) * self.bn

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
    """A tiling, and the cases it is for: architecture, group and columns at least these, rows of x at most m."""

    tiling: Tiling
    arch: int
    group: int
    m: int = UNLIMITED
    n: int = 0


_record: ContextVar[dict[Case, Tiling] | None] = ContextVar("awq_jax_lookups", default=None)


def limit(arch: int) -> int:
    """Bytes of shared memory that a program may take; where that is not known, what the smallest take."""
    return SHARED.get(arch, min(SHARED.values())) * 1024


@ft.cache
def packaged(part: str) -> tuple[Row, ...]:
    """Rows of table.json: "rule"; "untimed", of kernels that no GPU has timed yet, for who asks by name."""
    return tuple(Row(_tiling(r), r["arch"], r["group"], r.get("m", UNLIMITED), r.get("n", 0)) for r in _data()[part])


@ft.cache
def timed() -> tuple[tuple[Case, Tiling], ...]:
    """What table.json has measured: the fastest tiling of a case."""
    return tuple((_case(r), _tiling(r)) for r in _data()["measured"])


def _data() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("table.json").read_text())


def _tiling(r: Mapping[str, Any]) -> Tiling:
    return Tiling(**{field.name: r[field.name] for field in fields(Tiling) if field.name in r})


def _case(r: Mapping[str, Any]) -> Case:
    return Case(**{field.name: r[field.name] for field in fields(Case)})


def users_file() -> Path:
    """Where the tilings that this user measured are, a row a line."""
    return cache() / "tilings.jsonl"


def measured_with(device: str) -> dict[str, str]:
    """On which GPU and with which versions something was measured: with others it says nothing."""
    names = ("awq-jax", "jax", "triton")
    return {"device": device} | {name: metadata.version(name) for name in names if find_spec(name.replace("-", "_"))}


@ft.cache
def remembered(device: str) -> tuple[tuple[Case, Tiling], ...]:
    """What this user measured on a GPU, the newest first; lines that are something else are told and left out."""
    found, wrong, here = [], 0, measured_with(device)
    try:
        lines = users_file().read_text().splitlines()
    except (OSError, ValueError):
        # No file yet, or no home to have one in.
        return ()
    for line in lines:
        try:
            r = json.loads(line)
            case, tiling, with_what = _case(r), _tiling(r), r["with"]
        except (ValueError, TypeError, KeyError):
            wrong += 1
            continue
        if with_what == here and tiling.kernel in KERNELS and tiling.fits(case.arch):
            found.append((case, tiling))
    if wrong:
        warnings.warn(f"{users_file()}: {wrong} of its lines are no tilings and left out. Delete it.", stacklevel=2)
    return tuple(reversed(found))


def remember(case: Case, tiling: Tiling) -> None:
    """Programs of this user that are traced from now on take this tiling for this case."""
    row = asdict(case) | asdict(tiling) | {"with": measured_with(device())}
    file = users_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    cut = file.exists() and file.stat().st_size > 0 and not file.read_bytes().endswith(b"\n")
    with file.open("a") as f:
        f.write("\n" * cut + json.dumps(row) + "\n")
    remembered.cache_clear()


@contextmanager
def recorded() -> Iterator[dict[Case, Tiling]]:
    """What is looked up within the block, and what was found."""
    found: dict[Case, Tiling] = {}
    token = _record.set(found)
    try:
        yield found
    finally:
        _record.reset(token)


def power_of_two(m: int) -> int:
    """The smallest one that is at least m: what m rows are looked up as."""
    return 1 << max(0, m - 1).bit_length()


def tiling(arch: int, dtype: str, group: int, m: int, k: int, n: int) -> Tiling | None:
    """The tiling for x (m, k) and a weight (k, n); None where `too_many_rows` says why."""
    case = Case(arch, dtype, group, power_of_two(m), k, n)
    found = measured(case) or rule(arch, dtype, group, m, n)
    if found and (record := _record.get()) is not None:
        record[case] = found
    return found


def measured(case: Case, among: Sequence[str] = KERNELS) -> Tiling | None:
    """The tiling, of one of these kernels, that was the fastest: for this user on this GPU, else in table.json."""
    known = remembered(device()) + timed()
    return next((tiling for of, tiling in known if of == case and tiling.kernel in among), None)


def rule(arch: int, dtype: str, group: int, m: int, n: int) -> Tiling | None:
    """The tiling where nothing was measured; None as `tiling`."""
    on_tensor_cores = arch >= TENSOR_CORES and dtype != "float32"
    for row in packaged("rule"):
        at_least = arch >= row.arch and group >= row.group and n >= row.n
        fits = on_tensor_cores == (row.tiling.kernel != "gemv") and row.tiling.fits(arch)
        if at_least and m <= row.m and fits:
            return row.tiling
    return None


def too_many_rows(arch: int, dtype: str) -> str:
    """Why there is no tiling of a dtype on a GPU."""
    most = max(row.m for row in packaged("rule") if row.tiling.kernel == "gemv")
    return f"more than {most} rows of {dtype} on sm_{arch} would need tensor cores that take them{remedy(arch)}"


def remedy(arch: int) -> str:
    """What to do where a kernel needs tensor cores."""
    return ": cast x to bfloat16" if arch >= TENSOR_CORES else ""


def splits(programs: int, blocks: int, multiprocessors: int) -> int:
    """Into how many parts K is cut where there are too few programs for one on each multiprocessor.

    A part has 4 blocks of K or more, so that what is read ahead is read at all. Each costs a float32 of every result,
    written and read.
    """
    return max(1, min(round(multiprocessors / programs), blocks // 4))


def mosaic_tiling(m: int, n: int, multiprocessors: int) -> Tiling:
    """The tiling of the kernel for Hopper: 128 rows, or 64 where those tiles would leave multiprocessors idle."""
    small, large = (next(row.tiling for row in packaged("untimed") if row.tiling.bm == bm) for bm in (64, 128))
    tiles = -(-m // large.bm) * -(-n // large.bn)
    return large if m > small.bm and tiles >= multiprocessors else small


def triton_tiling(arch: int, dtype: str, group: int, m: int, k: int, n: int) -> Tiling | None:
    """The tiling of a Triton kernel, also where something else was measured, or is thought, to be faster; else None."""
    case = Case(arch, dtype, group, power_of_two(m), k, n)
    return measured(case, TRITON) or rule(arch, dtype, group, min(m, most_rows()), n)


def grouped_tiling(arch: int, dtype: str, group: int, m: int, n: int) -> Tiling:
    """The tiling for ragged groups of some m rows each, which only the kernel of many rows has."""
    found = None if m <= 16 else rule(arch, dtype, group, min(max(m, 33), most_rows()), n)
    return found or Tiling("ragged", 16, 64, 4, 4)


def most_rows() -> int:
    """Beyond which the rule multiplies with the dense weight."""
    return max(row.m for row in packaged("rule") if row.tiling.kernel == "tile")

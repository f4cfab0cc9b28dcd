"""Step "check": every kernel against float64, twice on poisoned memory, then under compute-sanitizer.

  python benchmarks/gpu_checks.py NAME ...

runs the named cases alone and fails where one is wrong: what compute-sanitizer watches.
"""

from __future__ import annotations

import functools as ft
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_record import Record, Row
from jax import lax

from awq_jax.kernels import grouped_int4_matmul, in_one_launch, int4_matmul
from awq_jax.kernels.gpu import architecture
from awq_jax.kernels.mosaic import matmul as mosaic
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import in_int4, in_tiles, round_to_nearest

SIZES = jnp.array([3, 0, 150, 40])
"""Rows of each expert, where rows are sorted; of 200 rows the last 7 belong to none."""


@dataclass(frozen=True)
class Case:
    """x (*lead, m, k) times weights (*lead, k, n) for each n; `way` is an implementation or a way to call several."""

    way: str
    m: int
    k: int = 1000
    ns: tuple[int, ...] = (330,)
    dtype: str = "bfloat16"
    group: int = 128
    lead: tuple[int, ...] = ()

    def __str__(self) -> str:
        shape = "x".join(map(str, (*self.lead, self.m, self.k, "+".join(map(str, self.ns)))))
        return f"{self.way}-{shape}-{self.dtype}-g{self.group}"

    def function(self) -> Callable[..., Any]:
        """Of x and the weights, a tuple of products."""
        sorted_rows = lambda x, w: (grouped_int4_matmul(x, w, SIZES, implementation="triton"),)
        scanned = lambda x, w: (lax.map(lambda one: int4_matmul(*one, implementation="triton"), (x, w)),)
        named = lambda x, w: (int4_matmul(x, w, implementation=self.way),)
        return {"shared": in_one_launch, "ragged": sorted_rows, "scanned": scanned}.get(self.way, named)

    def arguments(self) -> tuple[Any, ...]:
        """Random ones, other ones for each case."""
        rng = np.random.default_rng(zlib.crc32(str(self).encode()))
        draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
        pack = in_int4 if self.way == "direct" else in_tiles
        x = draw(self.m, self.k) if self.way == "ragged" else draw(*self.lead, self.m, self.k)
        ws = [pack(round_to_nearest(draw(*self.lead, self.k, n), QuantSpec(4, self.group))) for n in self.ns]
        return jnp.asarray(x, self.dtype), *ws


def cases(toy: bool) -> Iterator[Case]:
    """Every implementation; rows around the sizes of tiles, k and n that are multiples of nothing."""
    if toy:
        some = ft.partial(Case, k=128, ns=(64,), group=32)
        yield from (some(way, 3) for way in ("triton", "xla", "direct"))
        yield from (some("shared", 3, ns=(64, 8)), some("scanned", 3, lead=(2,)), some("mosaic", 3))
        yield some("ragged", 200, lead=(4,))
        return
    half = ("bfloat16", "float16")
    for group in (128, 32, 96, -1):
        for dtype in half:
            yield from (Case("triton", m, dtype=dtype, group=group) for m in (1, 8, 13, 32, 64, 100, 300, 1100))
            yield from (Case("xla", m, dtype=dtype, group=group) for m in (1, 300))
        yield from (Case("triton", m, dtype="float32", group=group) for m in (1, 8))
    yield from (Case("direct", m, dtype=dtype) for m in (1, 4, 16) for dtype in half)
    yield from (Case("shared", m, ns=ns) for m in (1, 13, 32) for ns in ((330, 64, 64), (330, 330)))
    yield from (Case("scanned", m, lead=(4,)) for m in (1, 64))
    yield Case("ragged", 200, 512, (256,), lead=(4,))
    yield from (Case("triton", m, 14336, (4096,)) for m in (1, 16, 64, 1024))
    if architecture() == mosaic.HOPPER:
        for group in (128, 32, 256, -1):
            for dtype in half:
                yield from (Case("mosaic", m, 1024, (320,), dtype, group, (2,)) for m in (40, 128, 200, 1100))
        yield Case("mosaic", 1024, 14336, (4096,))


def expected(case: Case, x: Any, *ws: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """The products and those of magnitudes, in float64."""
    x = np.asarray(x, np.float64)
    found = []
    for w in ws:
        dense = np.asarray(w.dequantize(), np.float64)
        if case.way == "ragged":
            owner = np.repeat(np.arange(len(SIZES)), SIZES)
            pad = ((0, len(x) - len(owner)), (0, 0))
            rows = lambda x, dense, owner=owner, pad=pad: np.pad(np.einsum("mk,mkn->mn", x, dense[owner]), pad)
            found.append((rows(x[: len(owner)], dense), rows(abs(x[: len(owner)]), abs(dense))))
        else:
            found.append((x @ dense, abs(x) @ abs(dense)))
    return found


def poison(ys: Any) -> None:
    """Leaves NaN in the memory that results like `ys` are likely to be given next."""
    jax.block_until_ready([jnp.full(y.shape, jnp.nan, y.dtype) for y in ys for _ in range(4)])


def of_bound(case: Case, run: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[float, float]:
    """The largest error over its bound, and the norm of errors over that of the products.

    Raises:
      ArithmeticError: an element that is no number or was not written; a second run that gave something else.
    """
    shapes = jax.eval_shape(case.function(), *arguments)
    poison(shapes)
    ys = run(*arguments)
    worst, norms = 0.0, []
    for y, (product, magnitude) in zip(ys, expected(case, *arguments), strict=True):
        error = np.abs(np.asarray(y, np.float64) - product)
        if not np.isfinite(error).all():
            raise ArithmeticError(f"{(~np.isfinite(error)).sum()} of {error.size} elements are no numbers")
        bound = (4 * float(jnp.finfo(y.dtype).eps) + case.k * 2.0**-23) * magnitude + 1e-30
        worst = max(worst, float(np.max(error / bound)))
        norms.append(np.linalg.norm(error) / np.linalg.norm(product))
    poison(shapes)
    if any((np.asarray(y) != np.asarray(again)).any() for y, again in zip(ys, run(*arguments), strict=True)):
        raise ArithmeticError("a second run gave something else: a race, or memory that nothing wrote")
    return worst, max(norms)


def compiled(case: Case, arguments: tuple[Any, ...]) -> Callable[[], Any]:
    """What compiles a case, which may be done beside others."""
    return jax.jit(case.function()).lower(*arguments).compile


def found(record: Record, some: list[Case]) -> None:
    """A row for each case, the programs compiled beside each other."""
    waiting: dict[Case, tuple[tuple[Any, ...], Future[Any]]] = {}
    with ThreadPoolExecutor() as pool:

        def begin(case: Case) -> Iterator[Row]:
            arguments = case.arguments()
            waiting[case] = arguments, pool.submit(compiled(case, arguments))
            yield from ()

        def check(case: Case) -> Iterator[Row]:
            arguments, program = waiting.pop(case)
            worst, norm = of_bound(case, program.result(), arguments)
            record.details.append({"case": str(case), "of_bound": worst, "norm": norm})
            yield Row(str(case), worst, "of the bound", 1.0, most=True)

        for case in some:
            record.attempt(str(case), ft.partial(begin, case))
        for case in list(waiting):
            record.attempt(str(case), ft.partial(check, case))


WATCHED = ("triton-13x", "triton-100x", "mosaic-2x40x", "shared-1x1000x330+330", "ragged", "scanned-4x64")


def sanitized(tool: str, toy: bool) -> Iterator[Row]:
    """What a tool of compute-sanitizer says of one case of each kernel; every buffer has memory of its own."""
    names = [name for c in cases(toy) if (name := str(c)).startswith(WATCHED) and name.endswith("bfloat16-g128")]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, *names]
    own = os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_FLAGS": "--xla_gpu_autotune_level=0"}
    done = subprocess.run(command, capture_output=True, text=True, env=own, timeout=70, check=False)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: " + " | ".join(lines[-4:]))
    yield Row(f"compute-sanitizer {tool}, {len(names)} cases", lines[-1] if lines else "no word")


def run(record: Record) -> None:
    found(record, list(cases(record.toy)))
    held = sum(row.verdict == "met" for row in record.rows)
    record.add(Row("cases within their bound", f"{held} of {len(record.rows)}"))
    for tool in ("memcheck", "racecheck"):
        if shutil.which("compute-sanitizer"):
            record.attempt(f"compute-sanitizer {tool}", ft.partial(sanitized, tool, record.toy))
        else:
            record.add(Row(f"compute-sanitizer {tool}", why="it is not installed here"))


def main() -> None:
    for case in cases(toy=False):
        if str(case) in sys.argv[1:]:
            arguments = case.arguments()
            worst, _ = of_bound(case, compiled(case, arguments)(), arguments)
            assert worst <= 1, f"{case}: {worst} of the bound"


if __name__ == "__main__":
    main()

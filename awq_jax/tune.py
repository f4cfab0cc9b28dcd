"""Which tiling of the kernels is fastest here: timed on this GPU, kept for later processes of this user."""

from __future__ import annotations

import functools as ft
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from awq_jax.kernels import table, triton
from awq_jax.kernels.gpu import TENSOR_CORES, architecture
from awq_jax.kernels.table import Case, Tiling
from awq_jax.spec import QuantSpec
from awq_jax.tensor import in_tiles, is_quantized, quantize

ROTATED = 256 * 2**20
"""Bytes of distinct weights that pass by, so that none stays in the cache from one matmul to the next."""
MOST = 128
ROWS = (1, 64, 1024, 16, 256, 4, 32, 128, 512, 2, 8, 2048, 4096)
"""Decoding and a prefill first, then what lies between them."""


@dataclass(frozen=True)
class Chain:
    """A jitted program of `count` matmuls, each with the next weight and an x that waits for the result before it."""

    run: Any
    x: Any
    weights: list[Any]
    count: int

    @classmethod
    def of(cls, multiply: Callable[..., Any], x: Any, weights: list[Any]) -> Chain:
        count = max(len(weights), 8)

        @jax.jit
        def run(x: Any, weights: list[Any]) -> Any:
            carried = jnp.zeros((), x.dtype)
            for i in range(count):
                y = multiply(x + carried, weights[i % len(weights)])
                carried = y[0, 0] * 0
            return y

        return cls(run.lower(x, weights), x, weights, count)

    def compiled(self) -> Chain:
        return replace(self, run=self.run.compile())

    def seconds(self, repeats: int = 5) -> float:
        """The median time of one matmul."""
        return timed(lambda: self.run(self.x, self.weights), repeats) / self.count


def timed(call: Callable[[], Any], repeats: int = 10) -> float:
    """The median time of a call."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def distinct(k: int, n: int, make: Callable[[Any], Any]) -> list[Any]:
    """What `make` makes of random dense weights (k, n): as many as do not fit into a cache, from 2 to MOST."""
    one = jax.jit(lambda key: make(jax.random.normal(key, (k, n), jnp.bfloat16) / k**0.5))
    first = one(jax.random.key(0))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(first))
    return [first, *(one(jax.random.key(i)) for i in range(1, min(max(2, -(-ROTATED // size)), MOST)))]


def candidates(case: Case) -> list[Tiling]:
    """The tilings worth timing for a case: those of the table, and of kernels not timed yet."""
    rows = [row for row in (*table.rows(), *table.untimed()) if row.exact is None]
    able = {row.tiling for row in rows if row.arch <= case.arch and row.group <= case.group}
    worth = {
        "decode": lambda t: t.bm == max(8, case.m),
        "tile": lambda t: case.m > 16,
        "mosaic": lambda t: t.bm <= case.m,
        "dense": lambda t: case.m >= 256,
        "gemv": lambda t: False,
    }
    return [
        t for t in dict.fromkeys(row.tiling for row in rows) if t in able and worth[t.kernel](t) and t.fits(case.arch)
    ]


def seconds_of(case: Case, weights: list[Any]) -> dict[Tiling, float]:
    """The time of one matmul in each tiling that runs, the fastest first."""
    x = jax.random.normal(jax.random.key(0), (case.m, case.k), jnp.dtype(case.dtype))
    times: dict[Tiling, float] = {}
    for t in candidates(case):
        try:
            times[t] = Chain.of(ft.partial(triton.matmul, tiling=t), x, weights).compiled().seconds(repeats=3)
        except Exception:
            # What does not compile or takes too much of the GPU is none to choose.
            continue
    return dict(sorted(times.items(), key=lambda item: item[1]))


def timings(
    shapes: Sequence[tuple[int, int]], *, group: int, dtype: Any, rows: Sequence[int] = ROWS
) -> Iterator[tuple[Case, dict[Tiling, float]]]:
    """Each number of rows with each shape (k, n): the case, and what `seconds_of` measures."""
    arch = architecture() or 0
    if arch < TENSOR_CORES:
        raise ValueError("tune times kernels that need an NVIDIA GPU of compute capability 8.0 or newer: none is here.")
    weights_of = ft.cache(lambda k, n: distinct(k, n, lambda w: in_tiles(quantize(w, QuantSpec(4, group)))))
    for m in rows:
        for k, n in shapes:
            weights = weights_of(k, n)
            case = Case(arch, jnp.dtype(dtype).name, weights[0].spec.group(k), m, k, n)
            yield case, seconds_of(case, weights)


@dataclass(frozen=True)
class Tuned:
    """The seconds of a matmul by tiling, the fastest first; and the tiling that served the case before."""

    case: Case
    before: Tiling
    seconds: dict[Tiling, float]

    @property
    def gain(self) -> float | None:
        """How many times as fast as before, None where what served before was not timed."""
        return self.seconds[self.before] / min(self.seconds.values()) if self.before in self.seconds else None


def tune(
    params: Any,
    *,
    dtype: Any = jnp.bfloat16,
    rows: Sequence[int] = ROWS,
    limit: float = math.inf,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Tuned]:
    """Times the kernels on the shapes of a model's 4-bit weights, and uses the fastest from then on.

    They are kept in the user's cache, for this process's next compilation and for later ones. What is compiled
    already stays as it is.

    Args:
      params: pytree with QuantizedTensors.
      dtype: of the activations, bfloat16 or float16.
      rows: of the activations, powers of two; other numbers use what their next power of two does.
      limit: seconds after which no further case is begun.
      progress: called with a stage, cases done and cases in all.

    Raises:
      ValueError: no GPU with tensor cores, or no 4-bit weights in params.
    """
    leaves = [w for w in jax.tree.leaves(params, is_leaf=is_quantized) if is_quantized(w) and w.spec.bits == 4]
    if not leaves:
        raise ValueError("params hold no 4-bit weights: give what awq.quantize or awq.load returned.")
    shapes: dict[int, dict[tuple[int, int], None]] = {}
    for w in leaves:
        shapes.setdefault(w.spec.group_size, {})[w.in_features, w.scales.shape[-1]] = None
    end = time.monotonic() + limit
    total = len(rows) * sum(map(len, shapes.values()))
    found: list[Tuned] = []
    for group, of_group in shapes.items():
        for case, times in timings(tuple(of_group), group=group, dtype=dtype, rows=rows):
            found.append(Tuned(case, table.tiling(**asdict(case)), times))
            if times:
                table.remember(case, next(iter(times)))
            progress("case", len(found), total)
            if time.monotonic() > end:
                return found
    return found

"""Which tiling of the kernels is fastest here: timed on this GPU, kept for later processes of this user."""

from __future__ import annotations

import functools as ft
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from awq_jax.kernels.chooser import TABLED, runner
from awq_jax.kernels.gpu import TENSOR_CORES, architecture
from awq_jax.kernels.tilings import table
from awq_jax.kernels.tilings.table import Case, Tiling
from awq_jax.kernels.triton import launch
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import SCALE_DTYPE, in_tiles, round_to_nearest

ROTATED = 256 * 2**20
"""Bytes of distinct weights that pass by, so that none stays in the cache from one matmul to the next."""
MOST = 128
SECONDS = 0.01
"""What a program shall take at least, beside which its launch is little."""


def program(multiply: Callable[..., Any], rounds: int) -> Callable[..., Any]:
    """Of x and weights: each of `rounds` rounds multiplies an x of its own with every weight."""

    def run(x: Any, weights: list[Any]) -> list[Any]:
        def one(ys: list[Any], x: Any) -> tuple[list[Any], None]:
            # Else XLA makes a weight dense once for all rounds.
            return [multiply(*lax.optimization_barrier((x, w))) for w in weights], None

        xs = x[None] * (1 + jnp.arange(rounds, dtype=x.dtype)[:, None, None] / rounds)
        ys = [jnp.zeros((len(x), weights[0].shape[-1]), x.dtype)] * len(weights)
        return lax.scan(one, ys, xs)[0]

    return run


@dataclass(frozen=True)
class Chain:
    """A `program` with its arguments."""

    run: Any
    x: Any
    weights: list[Any]
    rounds: int

    @classmethod
    def of(cls, multiply: Callable[..., Any], x: Any, weights: list[Any]) -> Chain:
        (m, k), n = x.shape, weights[0].shape[-1]
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
        # On a GPU with 3 TB/s and 600 TFLOP/s; on others it takes longer.
        ideal = max(size / 3e12, 2 * m * k * n * len(weights) / 6e14)
        rounds = min(64, max(2, math.ceil(SECONDS / ideal)))

        run = jax.jit(program(multiply, rounds))
        return cls(run.lower(x, weights), x, weights, rounds)

    def compiled(self) -> Chain:
        return replace(self, run=self.run.compile())

    def seconds(self, repeats: int = 5) -> float:
        """The median time of one matmul."""
        return timed(lambda: self.run(self.x, self.weights), repeats) / (self.rounds * len(self.weights))


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
    rows = table.packaged("rule") + table.packaged("untimed")
    able = [row.tiling for row in rows if row.arch <= case.arch and row.group <= case.group]
    worth = [t for t in dict.fromkeys(able) if runner(t.kernel).worth_timing(t, case)]
    return [t for t in worth if t.fits(case.arch)]


@dataclass(frozen=True)
class Tuned:
    """The seconds of a matmul by tiling, the fastest first; why others did not run; and what served the case before."""

    case: Case
    before: Tiling
    seconds: dict[Tiling, float]
    failed: dict[Tiling, str]

    @property
    def best(self) -> Tiling | None:
        """The fastest; None where what served before did not run, since then something is wrong with this machine."""
        return next(iter(self.seconds)) if self.before in self.seconds else None

    @property
    def gain(self) -> float:
        """How many times as fast as before."""
        return self.seconds[self.before] / self.seconds[self.best] if self.best else 1.0


def timings(case: Case, before: Tiling, weights: list[Any]) -> Tuned:
    """Every candidate of a case on weights like `distinct` makes them; compiled beside each other, before the clock."""
    x = jax.random.normal(jax.random.key(0), (case.m, case.k), jnp.dtype(case.dtype))
    times: dict[Tiling, float] = {}
    failed: dict[Tiling, str] = {}
    with ThreadPoolExecutor() as pool:
        chains: dict[Tiling, Future[Chain]] = {}
        for t in dict.fromkeys((before, *candidates(case))):
            try:
                chains[t] = pool.submit(Chain.of(ft.partial(TABLED.matmul, tiling=t), x, weights).compiled)
            except Exception as e:
                failed[t] = f"{type(e).__name__}: {e}"
    for t, chain in chains.items():
        # What does not compile, or takes too much of this GPU, is none to choose.
        try:
            times[t] = chain.result().seconds(repeats=3)
        except Exception as e:
            failed[t] = f"{type(e).__name__}: {e}"
    return Tuned(case, before, dict(sorted(times.items(), key=lambda item: item[1])), failed)


def check_gpu() -> None:
    """Passes if this machine runs what `tune` times."""
    if (architecture() or 0) < TENSOR_CORES:
        raise ValueError(
            "tune times kernels that need an NVIDIA GPU of compute capability 8.0 or newer: none is here; "
            "awq-jax doctor says what is."
        )
    if reason := launch.missing():
        raise ValueError(f"tune times kernels that cannot run here: {reason}")


def tune(
    fn: Callable[..., Any],
    *args: Any,
    limit: float = math.inf,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Tuned]:
    """Times the kernels on the matmuls of `fn(*args)`, and keeps the fastest of each in the user's cache.

    Programs traced afterwards take them, in this process and in later ones with the same GPU and versions. Everything
    that jax has traced and compiled in this process is dropped.

    Args:
      fn: a function that multiplies with QuantizedTensors; it is traced, not run.
      args: arrays, or what has their shapes.
      limit: seconds after which no further matmul is begun.
      progress: called with a stage, matmuls done and matmuls in all.

    Raises:
      ValueError: no NVIDIA GPU of compute capability 8.0 or newer, or no matmul of fn goes through a kernel for it.

    Example:
      >>> awq.tune(awq.quantized(fn), qparams, x)
    """
    check_gpu()
    jax.clear_caches()
    with table.recorded() as asked:
        jax.eval_shape(fn, *args)
    cases = {case: before for case, before in asked.items() if before.kernel != "gemv"}
    if not cases:
        raise ValueError(
            "no matmul of the function goes through a kernel that can be tuned: give it weights that awq.prepare has "
            "packed, and activations in bfloat16 or float16."
        )
    packed = lambda w, group: in_tiles(round_to_nearest(w, QuantSpec(4, group), steps=SCALE_DTYPE))
    weights_of = ft.cache(lambda k, n, g: distinct(k, n, ft.partial(packed, group=g)))
    end = time.monotonic() + limit
    found: list[Tuned] = []
    for case, before in cases.items():
        found.append(timings(case, before, weights_of(case.k, case.n, case.group)))
        if found[-1].best:
            table.remember(case, found[-1].best)
        progress("matmul", len(found), len(cases))
        if time.monotonic() > end:
            break
    jax.clear_caches()
    return found

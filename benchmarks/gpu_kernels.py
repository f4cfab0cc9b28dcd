"""Step "kernels": int4 matmuls against dense bfloat16, dequantize-then-dot, other projects' and the machine's ceilings.

Every time is the median of several runs of one jitted program that makes many matmuls in a chain, each with another
random weight, so that at least 256 MB of weights pass by and none stays in the cache; all of a shape take two turns,
whose difference is the noise. Other projects' matmuls (peers.py) are timed where they are installed; who is left out,
and why, is in the results. The few shapes and numbers of rows that matter come first, then all others.
"""

from __future__ import annotations

import functools as ft
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from gpu_record import Record, Row, reason
from peers import PEERS, Peer, copies, peer_seconds, usable

from awq_jax import kernels
from awq_jax.kernels.gpu import architecture
from awq_jax.kernels.mosaic import matmul as mosaic
from awq_jax.transforms.tune import Chain, distinct
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import SCALE_DTYPE, in_tiles, round_to_nearest

LLAMA_8B = ((4096, 4096), (4096, 6144), (4096, 14336), (14336, 4096))
LARGER = ((4096, 28672), (8192, 57344), (8192, 8192), (8192, 10240), (28672, 8192))
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
BETWEEN = (2, 8, 32, 128, 512, 2048)
BASELINE, OURS = "xla bf16", "int4_matmul"


def seconds(multiply: Callable[..., Any], x: Any, weights: list[Any]) -> float:
    """The median time of one matmul."""
    return Chain.of(multiply, x, weights).compiled().seconds()


def own(packed: list[Any], dense: list[Any], m: int) -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """What is compared, by name: a matmul and its weights. The first is what the others are held against."""
    named = lambda way: (ft.partial(kernels.int4_matmul, implementation=way), packed)
    found = {BASELINE: (lambda x, w: x @ w, dense), "xla dequantize": named("xla")}
    if architecture() is not None:
        found |= {OURS: (kernels.int4_matmul, packed), "triton": named("triton")}
    if architecture() == mosaic.HOPPER and m >= 64:
        found["mosaic"] = named("mosaic")
    return found


def goals(m: int, times: dict[str, float], floor: float, read: float, bandwidth: float) -> Iterator[Row]:
    """What the times of m rows mean, beside what is wanted of them."""
    t, rest = times[OURS], {name: t for name, t in times.items() if name in PEERS}
    if m <= 16:
        yield Row("", read / t / bandwidth, "of the bandwidth", 0.85)
    yield Row("", times[BASELINE] / t, "x bf16", 3.3 if m <= 16 else 0.95 if m >= 512 else None)
    yield Row("", floor / t, "of the roofline")
    if rest:
        peer = min(rest, key=lambda name: rest[name])
        yield Row("", rest[peer] / t, f"x {peer}, the fastest peer", 1.0 if 32 <= m <= 128 else None)
    if "mosaic" in times and m >= 256:
        yield Row("", times["triton"] / times["mosaic"], "x triton: the kernel for Hopper")


def times_of(
    k: int, n: int, rows: Sequence[int], others: dict[str, Peer], record: Record
) -> Iterator[tuple[int, dict[str, list[float]]]]:
    """For each number of rows, the times of two turns by name; what does not run is told in the record."""
    packed = distinct(k, n, lambda w: in_tiles(round_to_nearest(w, QuantSpec(4, 128), steps=SCALE_DTYPE)))
    dense = distinct(k, n, lambda w: w)
    xs = {m: jax.random.normal(jax.random.key(0), (m, k), jnp.bfloat16) for m in rows}
    chains: dict[int, dict[str, Future[Chain]]] = {m: {} for m in xs}
    left_out = lambda name, m, e: record.add(Row(f"{k} x {n}, {m} rows, {name}", why=reason(e)))
    # Compiled beside each other, before the clock.
    with ThreadPoolExecutor() as pool:
        for m, x in xs.items():
            for name, (multiply, weights) in own(packed, dense, m).items():
                try:
                    chains[m][name] = pool.submit(Chain.of(multiply, x, weights).compiled)
                except Exception as e:
                    left_out(name, m, e)
    converted: dict[str, list[Any]] = {}
    for name, peer in others.items():
        try:
            converted[name] = copies(peer.convert(packed[0]), len(packed))
        except Exception as e:
            left_out(name, 0, e)
    for m, x in xs.items():
        clocks: dict[str, Callable[[], float]] = {
            name: lambda c=c: c.result().seconds() for name, c in chains[m].items()
        }
        clocks |= {
            name: ft.partial(peer_seconds, others[name], x, weights, seconds) for name, weights in converted.items()
        }
        turns: dict[str, list[float]] = {name: [] for name in clocks}
        for _ in range(2):
            for name, clock in clocks.items():
                try:
                    turns[name].append(clock())
                except Exception as e:
                    left_out(name, m, e)
        yield m, {name: turn for name, turn in turns.items() if len(turn) == 2}
        if record.over():
            return


def measured(k: int, n: int, rows: Sequence[int], others: dict[str, Peer], record: Record) -> Iterator[Row]:
    top = record.ceilings()
    for m, turns in times_of(k, n, rows, others, record):
        bytes_of = {True: 2 * k * n, False: k * n / 2 + 3 * k * n / 128}
        read = {name: bytes_of[name == BASELINE] + 2 * m * (k + n) for name in turns}
        computed = 2 * m * k * n / top["flop_per_s"]
        floors = {name: max(computed, size / top["bytes_per_s"]) for name, size in read.items()}
        for name, (one, two) in turns.items():
            sizes = {"k": k, "n": n, "m": m, "name": name, "floor_us": floors[name] * 1e6}
            record.details.append(sizes | {"us": min(one, two) * 1e6, "noise": abs(one - two) / min(one, two)})
        times = {name: min(turn) for name, turn in turns.items()}
        told = "  ".join(f"{name} {t * 1e6:.4g}" for name, t in times.items())
        yield Row(f"{k} x {n}, {m} rows", told, "us")
        if OURS in times and BASELINE in times:
            for row in goals(m, times, floors[OURS], read[OURS], top["bytes_per_s"]):
                yield Row(f"{k} x {n}, {m} rows", row.found, row.unit, row.goal)


def run(record: Record) -> None:
    others, left_out = usable(PEERS)
    for name, why in left_out.items():
        record.add(Row(f"peer {name}", why=why))
    stages = [(LLAMA_8B, ROWS), (LLAMA_8B, BETWEEN), (LARGER, ROWS + BETWEEN)]
    for shapes, rows in [(((128, 32),), (1, 64))] if record.toy else stages:
        for k, n in shapes:
            record.attempt(f"{k} x {n}", ft.partial(measured, k, n, rows, others, record))

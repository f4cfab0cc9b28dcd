"""Time of the int4 matmul against dense bfloat16, dequantize-then-dot, other projects' and the machine's own ceilings.

python benchmarks/kernels.py [--small] [--shapes 4096x4096 4096x28672]
python benchmarks/kernels.py --tune SECONDS

Every figure is the median of several runs of one jitted program that makes many matmuls in a chain, each with another
weight, so that at least 256 MB of weights pass by and none stays in the cache. Other projects' matmuls (peers.py) are
timed where they are installed (pip install torch gemlite humming-kernels tokamax); who is left out, and why, is in the
results. Writes results/kernels.json; with --tune, instead, the best tilings into kernels/table.json. --small runs tiny
shapes, so that a machine without a GPU can check the script.
"""

from __future__ import annotations

import argparse
import functools as ft
import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from peers import PEERS, peer_seconds, reason, usable

from awq_jax import kernels
from awq_jax.kernels import mosaic, table
from awq_jax.kernels.gpu import architecture
from awq_jax.kernels.table import Case, Tiling
from awq_jax.spec import QuantSpec
from awq_jax.tensor import in_tiles, quantize
from awq_jax.tune import Chain, distinct, timed, timings

RESULTS = Path(__file__).parent / "results"
TABLE = Path(kernels.__file__).with_name("table.json")
LLAMA_8B = ((4096, 4096), (4096, 6144), (14336, 4096), (4096, 28672))
LLAMA_70B = ((8192, 57344), (8192, 8192), (8192, 10240), (28672, 8192))
SHAPES = LLAMA_8B + LLAMA_70B
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TUNED_ROWS = (1, 1024, 64, 4096, 16, 256, 4, 32, 128, 512, 2, 8, 2048)
"""Decoding and a prefill first, then what lies between them."""
BASELINE = "xla bf16"


def seconds(multiply: Callable[..., Any], x: Any, weights: list[Any]) -> float:
    """The median time of one matmul."""
    return Chain.of(multiply, x, weights).compiled().seconds()


def ceilings(small: bool) -> dict[str, float]:
    """Bytes/s of a copy and FLOP/s of a bfloat16 matmul, measured."""
    n = 2**20 if small else 2**29
    a = jax.random.normal(jax.random.key(0), (n,), jnp.bfloat16)
    copy = jax.jit(lambda a, k: a + k)
    size = 256 if small else 8192
    b = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    return {
        "bytes_per_s": 4 * n / timed(lambda: copy(a, jnp.bfloat16(1))),
        "flop_per_s": 2 * size**3 / timed(lambda: product(b, b)),
    }


def weights_of(k: int, n: int, small: bool) -> tuple[list[Any], list[Any]]:
    """Packed and dense weights of one shape, enough of each to pass the cache."""
    most = 2 if small else None
    packed = distinct(k, n, lambda w: in_tiles(quantize(w, QuantSpec(4, 128))))
    return packed[:most], distinct(k, n, lambda w: w)[:most]


def own(packed: list[Any], dense: list[Any], m: int, on_gpu: bool) -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """What is compared, by name: a matmul and its weights. The first is what the others are held against."""
    found = {
        BASELINE: (lambda x, w: x @ w, dense),
        "xla dequantize": (ft.partial(kernels.int4_matmul, implementation="xla"), packed),
    }
    if on_gpu:
        found["int4_matmul"] = (kernels.int4_matmul, packed)
        found["triton"] = (ft.partial(kernels.int4_matmul, implementation="triton"), packed)
        if architecture() == mosaic.HOPPER and m >= 64:
            found["mosaic"] = (ft.partial(kernels.int4_matmul, implementation="mosaic"), packed)
    return found


def measure(shapes: Sequence[tuple[int, int]], numbers_of_rows: Sequence[int], small: bool, out: Path) -> None:
    """Times of every shape and number of rows, written as they come: a run that is cut short leaves what it had."""
    on_gpu = jax.default_backend() == "gpu"
    top, rows = ceilings(small), []
    others, left_out = usable(PEERS)
    for k, n in shapes:
        packed, dense = weights_of(k, n, small)
        xs = {m: jax.random.normal(jax.random.key(0), (m, k), jnp.bfloat16) for m in numbers_of_rows}
        chains: dict[int, dict[str, Future[Chain]]] = {m: {} for m in xs}
        # Compiled beside each other, before the clock.
        with ThreadPoolExecutor() as pool:
            for m, x in xs.items():
                for name, (multiply, weights) in own(packed, dense, m, on_gpu).items():
                    try:
                        chains[m][name] = pool.submit(Chain.of(multiply, x, weights).compiled)
                    except Exception as e:
                        left_out[f"{name}, {m} rows of {k} x {n}"] = reason(e)
        converted: dict[str, list[Any]] = {}
        for name, peer in others.items():
            try:
                converted[name] = [peer.convert(w) for w in packed]
            except Exception as e:
                left_out[f"{name}, {k} x {n}"] = reason(e)
        for m, x in xs.items():
            clocks: dict[str, Callable[[], float]] = {
                name: lambda c=c: c.result().seconds() for name, c in chains[m].items()
            }
            clocks |= {
                name: lambda name=name, x=x, weights=weights: peer_seconds(others[name], x, weights, seconds)
                for name, weights in converted.items()
            }
            times = {}
            for name, clock in clocks.items():
                try:
                    times[name] = clock()
                except Exception as e:
                    left_out[f"{name}, {m} rows of {k} x {n}"] = reason(e)
            for name, t in times.items():
                weight = (dense if name == BASELINE else packed)[0]
                read = sum(leaf.nbytes for leaf in jax.tree.leaves(weight)) + 2 * m * (k + n)
                rows.append(
                    {
                        "k": k,
                        "n": n,
                        "m": m,
                        "name": name,
                        "us": t * 1e6,
                        "over_bf16": times.get(BASELINE, math.nan) / t,
                        "of_bandwidth": read / t / top["bytes_per_s"],
                        "of_flops": 2 * m * k * n / t / top["flop_per_s"],
                    }
                )
                print(
                    "{k:6} x {n:6}  m {m:5}  {name:15} {us:10.2f} us  {over_bf16:5.2f} x bf16  "
                    "{of_bandwidth:5.0%} of bytes/s".format(**rows[-1])
                )
            device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
            result = {**device, "ceilings": top, "rows": rows, "left_out": left_out}
            out.write_text(json.dumps(result, indent=1) + "\n")
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")


def tune(limit: float) -> None:
    """Writes the fastest tiling of each shape and number of rows into the table, until `limit` seconds are over.

    A case is written as soon as it is timed.
    """
    end, arch = time.monotonic() + limit, architecture() or 0
    weights = ft.cache(lambda k, n: weights_of(k, n, small=False)[0])
    for m in TUNED_ROWS:
        for k, n in LLAMA_8B:
            case = Case(arch, "bfloat16", 128, m, k, n)
            found = timings(case, table.rule(arch, case.dtype, case.group, m, n), weights(k, n))
            for t, taken in found.seconds.items():
                print(f"{k:6} x {n:6}  m {m:5}  {taken * 1e6:10.2f} us  {t}")
            for t, why in found.failed.items():
                print(f"{k:6} x {n:6}  m {m:5}  {t}: {why.splitlines()[0]}")
            if found.best:
                write_row(asdict(case), found.best)
            if time.monotonic() > end:
                return


def write_row(case: dict[str, Any], best: Tiling) -> None:
    """`best` as the table's measured tiling of a case, in the place of what was there."""
    data = json.loads(TABLE.read_text())
    others = [row for row in data["measured"] if any(row[key] != value for key, value in case.items())]
    data["measured"] = [*others, case | asdict(best)]
    lines = {key: ",\n".join(f"  {json.dumps(row)}" for row in data[key]) for key in ("measured", "untimed", "rule")}
    parts = [f' "comment": {json.dumps(data["comment"])}'] + [f' "{key}": [\n{rows}\n ]' for key, rows in lines.items()]
    TABLE.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    table.timed.cache_clear()


def shape(text: str) -> tuple[int, int]:
    k, n = map(int, text.split("x"))
    return k, n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny shapes, any machine")
    parser.add_argument(
        "--tune", type=float, metavar="SECONDS", help="so long write the best tilings into kernels/table.json; a GPU"
    )
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, metavar="KxN", help="of the weights")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.json")
    options = parser.parse_args()
    if options.tune:
        tune(options.tune)
        return
    options.out.parent.mkdir(exist_ok=True)
    shapes, rows = (((256, 256),), (1, 16)) if options.small else (options.shapes, ROWS)
    measure(shapes, rows, options.small, options.out)


if __name__ == "__main__":
    main()

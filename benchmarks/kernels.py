"""Time of the int4 matmul against dense bfloat16, dequantize-then-dot, other projects' and the machine's own ceilings.

python benchmarks/kernels.py [--small] [--tune]

Every figure is the median of several runs of one jitted program that makes many matmuls in a chain, each with another
weight, so that at least 256 MB of weights pass by and none stays in the cache. Other projects' matmuls (peers.py) are
timed where they are installed (pip install torch gemlite humming-kernels tokamax); who is left out, and why, is in the
results. Writes results/kernels.json; with --tune the best tilings go into kernels/table.json. --small runs tiny shapes,
so that a machine without a GPU can check the script.
"""

from __future__ import annotations

import argparse
import functools as ft
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from peers import PEERS, peer_seconds, reason, usable

from awq_jax import kernels
from awq_jax.kernels import table, triton
from awq_jax.kernels.gpu import architecture
from awq_jax.spec import QuantSpec
from awq_jax.tensor import in_tiles, quantize

RESULTS = Path(__file__).parent / "results"
TABLE = Path(kernels.__file__).with_name("table.json")
SHAPES = ((4096, 4096), (4096, 6144), (14336, 4096), (4096, 28672), (8192, 57344))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
BASELINE = "xla bf16"
ROTATED = 256 * 2**20


def chain(multiply: Callable[..., Any], count: int) -> Callable[..., Any]:
    """`count` matmuls, each with the next weight and with an x that waits for the result before it."""

    @jax.jit
    def run(x: Any, weights: list[Any]) -> Any:
        carried = jnp.zeros((), x.dtype)
        for i in range(count):
            y = multiply(x + carried, weights[i % len(weights)])
            carried = y[0, 0] * 0
        return y

    return run


def seconds(multiply: Callable[..., Any], x: Any, weights: list[Any], repeats: int = 5) -> float:
    """The median time of one matmul."""
    count = max(len(weights), 8)
    run = chain(multiply, count)
    return timed(lambda: run(x, weights), repeats) / count


def ceilings(small: bool) -> dict[str, float]:
    """Bytes/s of a copy and FLOP/s of a bfloat16 matmul, measured."""
    n = 2**20 if small else 2**29
    a = jnp.ones((n,), jnp.bfloat16)
    copy = jax.jit(lambda a, k: a + k)
    size = 256 if small else 8192
    b = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    return {
        "bytes_per_s": 4 * n / timed(lambda: copy(a, jnp.bfloat16(1))),
        "flop_per_s": 2 * size**3 / timed(lambda: product(b, b)),
    }


def timed(call: Callable[[], Any], repeats: int = 10) -> float:
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def weights_of(k: int, n: int, small: bool) -> tuple[list[Any], list[Any]]:
    """Packed and dense weights of one shape, enough of each to pass the cache."""
    make = jax.jit(lambda key: jax.random.normal(key, (k, n), jnp.bfloat16) / k**0.5)
    bytes_of = lambda per_weight: max(2, -(-ROTATED // int(k * n * per_weight)))
    counts = (2, 2) if small else (bytes_of(0.53), bytes_of(2))
    spec = QuantSpec(4, 128)
    pack = jax.jit(lambda w: in_tiles(quantize(w, spec)))
    packed = [pack(make(jax.random.key(i))) for i in range(counts[0])]
    return packed, [make(jax.random.key(i)) for i in range(counts[1])]


def own(packed: list[Any], dense: list[Any], on_gpu: bool) -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """What is compared, by name: a matmul and its weights. The first is what the others are held against."""
    found = {
        BASELINE: (lambda x, w: x @ w, dense),
        "xla dequantize": (ft.partial(kernels.int4_matmul, implementation="xla"), packed),
    }
    if on_gpu:
        found["int4_matmul"] = (kernels.int4_matmul, packed)
        found["triton"] = (always_the_kernel, packed)
    return found


def always_the_kernel(x: Any, w: Any) -> Any:
    """The kernel also where the table makes the weight dense: where the two cross is what is asked."""
    t = table.kernel_tiling(architecture(), x.dtype.name, w.spec.group(x.shape[-1]), x.shape[0], *w.shape)
    return triton.matmul(x, w, tiling=t)


def measure(small: bool, out: Path) -> None:
    """Times of every shape and number of rows, written after each shape: a run that is cut short leaves what it had."""
    on_gpu = jax.default_backend() == "gpu"
    top, rows = ceilings(small), []
    others, left_out = usable(PEERS)
    for k, n in ((256, 256),) if small else SHAPES:
        packed, dense = weights_of(k, n, small)
        converted = {name: [peer.convert(w) for w in packed] for name, peer in others.items()}
        for m in (1, 16) if small else ROWS:
            x = jax.random.normal(jax.random.key(0), (m, k), jnp.bfloat16)
            times = {
                name: seconds(multiply, x, weights) for name, (multiply, weights) in own(packed, dense, on_gpu).items()
            }
            for name, weights in converted.items():
                try:
                    times[name] = peer_seconds(others[name], x, weights, seconds)
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
                        "over_bf16": times[BASELINE] / t,
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


def tune() -> list[dict[str, Any]]:
    """The fastest tiling of each shape and bucket of rows, as rows of the table."""
    arch = architecture()
    candidates = [t for t in dict.fromkeys(row.tiling for row in table.rows() if row.exact is None) if t.fits(arch)]
    best = []
    for k, n in SHAPES[:4]:
        packed, _ = weights_of(k, n, small=False)
        for m in (1, 8, 16, 32, 64, 256, 1024, 2048, 4096):
            x = jax.random.normal(jax.random.key(0), (m, k), jnp.bfloat16)
            times = {}
            for t in candidates:
                if t.kernel == "decode" and m > t.bm:
                    continue
                times[t] = seconds(ft.partial(triton.matmul, tiling=t), x, packed, repeats=3)
            t = min(times, key=times.__getitem__)
            case = {"arch": arch, "dtype": "bfloat16", "group": 128, "m": m, "k": k, "n": n}
            best.append(case | asdict(t))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny shapes, any machine")
    parser.add_argument("--tune", action="store_true", help="write the best tilings into kernels/table.json; a GPU")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.json")
    options = parser.parse_args()
    if options.tune:
        data = json.loads(TABLE.read_text())
        fresh = tune()
        keys = ("arch", "dtype", "group", "m", "k", "n")
        measured = {tuple(r[key] for key in keys): r for r in (*data["measured"], *fresh)}
        TABLE.write_text(json.dumps({**data, "measured": list(measured.values())}, indent=1) + "\n")
        table.rows.cache_clear()
    options.out.parent.mkdir(exist_ok=True)
    measure(options.small, options.out)


if __name__ == "__main__":
    main()

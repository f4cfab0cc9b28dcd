"""Step "profile": the hardware's own count, by ncu, of the two numbers of a kernel: bytes moved and operations.

  python benchmarks/gpu_profile.py M K N IMPLEMENTATION

makes one matmul, what ncu watches. Clocks are left as they are.
"""

from __future__ import annotations

import csv
import functools as ft
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from gpu_record import Record, Row

from awq_jax.kernels import int4_matmul
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import in_tiles, round_to_nearest

METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "lts__t_bytes.sum": "through L2",
    "smsp__inst_executed.sum": "instructions of warps",
    "sm__inst_executed_pipe_tensor.sum": "instructions of tensor cores",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor cores busy",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory busy",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps resident",
    "launch__registers_per_thread": "registers a thread",
}
SCALE = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "ns": 1, "nsecond": 1, "us": 1e3, "usecond": 1e3}
SCALE |= {"ms": 1e6, "msecond": 1e6}
CASES = ((1, 4096, 14336, "triton"), (16, 4096, 14336, "triton"), (64, 4096, 14336, "triton"))
LARGE = ((1024, 4096, 14336, "triton"), (1024, 4096, 14336, "mosaic"))


def multiply(m: int, k: int, n: int, way: str) -> None:
    x = jax.random.normal(jax.random.key(0), (m, k), jnp.bfloat16)
    w = in_tiles(round_to_nearest(jax.random.normal(jax.random.key(1), (k, n), jnp.bfloat16), QuantSpec(4, 128)))
    run = jax.jit(ft.partial(int4_matmul, implementation=way))
    jax.block_until_ready([run(x, w) for _ in range(2)])


def counted(text: str) -> dict[str, float]:
    """ncu's CSV as numbers by metric, of the last kernel listed: bytes, and ns."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise RuntimeError("ncu listed no kernel: " + " | ".join(lines[-4:]))
    rows = list(csv.DictReader(lines[start:]))
    last = rows[-1]["ID"]
    value = lambda row: float(row["Metric Value"].replace(",", "")) * SCALE.get(row["Metric Unit"], 1)
    return {row["Metric Name"]: value(row) for row in rows if row["ID"] == last and row["Metric Value"][:1].isdigit()}


def profiled(m: int, k: int, n: int, way: str, record: Record) -> Iterator[Row]:
    kernel = "regex:awq_|mosaic|kernel" if way == "mosaic" else "regex:awq_|decode|tile|gemv"
    command = ["ncu", "--csv", "--clock-control", "none", "--kernel-name", kernel, "--metrics", ",".join(METRICS)]
    command += [sys.executable, __file__, *map(str, (m, k, n, way))]
    own = os.environ | {"XLA_FLAGS": "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0"}
    own |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=own, timeout=120, check=False)
    try:
        found = counted(done.stdout)
    except RuntimeError as e:
        raise RuntimeError(f"{e} {done.stderr[-200:]}") from e
    record.details.append({"m": m, "k": k, "n": n, "way": way, "counted": found})
    top = record.ceilings()
    least = k * n / 2 + 3 * k * n / 128 + 2 * m * (k + n)
    moved = found.get("dram__bytes_read.sum", 0) + found.get("dram__bytes_write.sum", 0)
    floor = max(least / top["bytes_per_s"], 2 * m * k * n / top["flop_per_s"])
    what = f"{way}, {m} x {k} x {n}"
    yield Row(f"{what}: bytes moved", moved / least, "x the least", 1.1, most=True)
    yield Row(f"{what}: weights", found.get("smsp__inst_executed.sum", 0) * 32 / (k * n), "instructions a weight")
    yield Row(f"{what}: time", found.get("gpu__time_duration.sum", 0) / 1e9 / floor, "x the floor", 1.2, most=True)
    for metric, words in list(METRICS.items())[5:]:
        if metric in found:
            yield Row(f"{what}: {words}", found[metric])


def run(record: Record) -> None:
    if not shutil.which("ncu"):
        record.add(Row("ncu", why="it is not installed here"))
        return
    for case in CASES[:1] if record.toy else CASES + LARGE:
        record.attempt(" ".join(map(str, case)), ft.partial(profiled, *case, record))


if __name__ == "__main__":
    multiply(*map(int, sys.argv[1:4]), sys.argv[4])

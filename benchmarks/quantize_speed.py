"""Seconds by stage, compile time apart, peak memory and KL of quantizing, against the number of calibration tokens.

  python benchmarks/quantize_speed.py --calib calib.txt --texts news.txt novel.txt --tokens 1024 4096 16384 65536

Each size runs in a process of its own. The floor is the time that the calibration forward passes alone would take at
the matmul rate measured in the same process, in the dtype that calibration uses on this machine.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))


@dataclass(frozen=True)
class Arguments:
    calib: str | None = None
    tokens: tuple[int, ...] = (1024, 4096, 16384, 65536)
    texts: tuple[Path, ...] = ()
    """Texts to score on; the calibration text must not be one of them."""
    presets: tuple[str, ...] = ("default",)
    model: str | None = None
    seq_len: int = 512
    group_size: int = 64
    format: str = "awq"
    name: str = "quantize_speed"
    """Of the JSON file under benchmarks/results."""
    worker: bool = False
    """Run one size here and print it as JSON."""


def work(a: Arguments) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    compiling = [0.0, 0]

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiling[0] += seconds
            compiling[1] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    from awq_jax.commands.demo import fetch_smollm2
    from awq_jax.formats.checkpoint import open_checkpoint
    from awq_jax.machine import fast_dtype
    from awq_jax.models import for_config
    from awq_jax.models.family import matrix_shapes
    from awq_jax.pipeline.load import load
    from awq_jax.pipeline.quantize_checkpoint import quantize_checkpoint
    from awq_jax.transforms.presets import PRESETS

    model = a.model or str(fetch_smollm2())
    recipe = replace(PRESETS[a.presets[0]], group_size=a.group_size)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        done = quantize_checkpoint(
            model,
            Path(scratch, "out"),
            recipe,
            format=a.format,  # type: ignore[arg-type]
            calib=a.calib,
            samples=max(1, a.tokens[0] // a.seq_len),
            seq_len=a.seq_len,
        )
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        compiled = tuple(compiling)
        kl = scores(a.texts, load(model, jnp.float32), load(Path(scratch, "out"), jnp.float32))
    found = open_checkpoint(model).config
    weights = sum(math.prod(shape) for shape in matrix_shapes(for_config(found).config(found)).values())
    rate = matmul_rate(jax, jnp, fast_dtype())
    return {
        "seconds": seconds,
        "stages": done.seconds,
        "compile": compiled[0],
        "compilations": compiled[1],
        "peak_gb": peak,
        "matmul_gflops": rate / 1e9,
        "floor": 2 * weights * a.tokens[0] / rate,
        "kl": kl,
    }


def scores(texts: tuple[Path, ...], dense: Any, small: Any) -> dict[str, float]:
    """KL by text, on 8 windows of 1024 tokens."""
    from awq_jax.pipeline.score import score, windows

    tokens = {text.stem: windows(text.read_text("utf-8"), dense.tokenizer, 8, 1024) for text in texts}
    return {name: score(small, ids, dense).kl or 0.0 for name, ids in tokens.items()}


def matmul_rate(jax: Any, jnp: Any, dtype: Any) -> float:
    """Multiply-adds a second, times two, summed in float32; the best of ten tries."""
    x, w = jnp.ones((2048, 1536), dtype), jnp.ones((1536, 1536), dtype)
    f = jax.jit(lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32))
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(5):
            f(x, w).block_until_ready()
        best = max(best, 5 * 2 * 2048 * 1536 * 1536 / (time.perf_counter() - start))
    return best


def main(a: Arguments) -> None:
    if a.worker:
        print(json.dumps(work(a)))
        return
    from common import save

    columns = ("preset", "tokens", "seconds", "compile", "statistics", "search", "load+write", "floor", "peak GB")
    table = Table(*columns, *(f"KL {text.stem}" for text in a.texts), title="Quantizing, seconds")
    result = []
    for preset in a.presets:
        for n in a.tokens:
            command = [sys.executable, __file__, "--worker", "--tokens", str(n), "--presets", preset]
            command += ["--seq-len", str(a.seq_len), "--group-size", str(a.group_size), "--format", a.format]
            command += [x for k, v in (("--calib", a.calib), ("--model", a.model)) if v for x in (k, v)]
            command += ["--texts", *map(str, a.texts)] if a.texts else []
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            r = json.loads(done.stdout.splitlines()[-1])
            result.append({"preset": preset, "tokens": n, **r})
            s = r["stages"]
            statistics = s["statistics"]
            cells = (r["seconds"], r["compile"], statistics, s["search"], s["load"] + s["write"], r["floor"])
            table.add_row(
                preset,
                str(n),
                *(f"{c:.1f}" for c in cells),
                f"{r['peak_gb']:.2f}",
                *(f"{kl:.4f}" for kl in r["kl"].values()),
            )
            print(preset, n, r, file=sys.stderr, flush=True)
    Console().print(table)
    save(a.name, result)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

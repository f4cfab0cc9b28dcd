"""Tokens a second of a decoder, dense and quantized, in one run.

  python benchmarks/decode.py DENSE QUANTIZED

Each generates the same number of tokens in turns, after one run that compiles; medians and their ratio.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from common import save

from awq_jax.load import load
from awq_jax.models.generate import generate


@dataclass(frozen=True)
class Arguments:
    dense: Annotated[str, tyro.conf.Positional]
    quantized: Annotated[str, tyro.conf.Positional]
    batch: int = 1
    prompt: int = 32
    tokens: int = 64
    runs: int = 5
    name: str = "decode"
    """Of the JSON file under benchmarks/results."""


def main(a: Arguments) -> None:
    models = {"dense": load(a.dense), "quantized": load(a.quantized)}
    prompt = jnp.ones((a.batch, a.prompt), jnp.int32)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for run in range(a.runs + 1):
        for name, model in models.items():
            start = time.perf_counter()
            jax.block_until_ready(generate(model.config, model.params, prompt, max_new_tokens=a.tokens))
            if run:
                seconds[name].append(time.perf_counter() - start)
    rates = {name: a.batch * a.tokens / statistics.median(times) for name, times in seconds.items()}
    table = Table("", "tokens/s", title=f"Batch {a.batch}, prompt {a.prompt}, {a.tokens} new tokens")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:.1f}")
    Console().print(table)
    save(a.name, {"batch": a.batch, "prompt": a.prompt, "tokens": a.tokens, "tokens_per_second": rates})


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

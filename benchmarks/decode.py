"""Tokens a second of a decoder, dense and quantized, in one run.

  python benchmarks/decode.py [DENSE [QUANTIZED]] [--name decode_cpu]

Without models SmolLM2-135M in float32; a config.json stands for random weights of its sizes in bfloat16. Without a
quantized one, the dense one rounded to nearest: speed does not depend on which codes there are. The models take turns,
each generating one token and then many. The difference is the time of a token; the first holds the prompt and, on a
CPU, the making of dense weights. Medians; the ratio is that of each turn, so that what else the machine does falls on
both.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from common import save

from awq_jax.commands.demo import fetch_smollm2
from awq_jax.kernels.gpu import architecture
from awq_jax.models import for_config
from awq_jax.models.decoder import Decoder
from awq_jax.models.generate import generate
from awq_jax.pipeline.load import Model, load
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import prepare, round_to_nearest


@dataclass(frozen=True)
class Arguments:
    dense: Annotated[str | None, tyro.conf.Positional] = None
    quantized: Annotated[str | None, tyro.conf.Positional] = None
    batch: tuple[int, ...] = (1,)
    prompt: int = 32
    tokens: int = 65
    group: int = 64
    """Of the weights that are rounded here."""
    runs: int = 9
    name: str = "decode"
    """Of the JSON file under benchmarks/results; of several batches each has its own."""


def opened(path: str | Path) -> Model:
    """The model at `path`, or one of random weights where it is a config.json."""
    return random_model(json.loads(Path(path).read_text())) if Path(path).suffix == ".json" else load(path)


def random_model(hf: dict[str, Any]) -> Model:
    """A model of a config.json's sizes with random weights in bfloat16."""
    family = for_config(hf)
    config = family.config(hf, jnp.bfloat16)
    shapes = jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    make = jax.jit(lambda shape: jax.random.normal(jax.random.key(0), shape, jnp.bfloat16) / 50, static_argnums=0)
    return Model(family, config, jax.tree.map(lambda leaf: make(leaf.shape), shapes), None)


def rounded(model: Model, group: int) -> Model:
    """`model` with 4-bit kernels."""
    pack = lambda path, leaf: round_to_nearest(leaf, QuantSpec(4, group)) if path[-1].key == "kernel" else leaf
    params = jax.tree_util.tree_map_with_path(pack, model.params)
    return replace(model, params=params if architecture() is None else prepare(params))


def seconds(model: Model, prompt: jax.Array, tokens: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready(generate(model.config, model.params, prompt, max_new_tokens=tokens))
    return time.perf_counter() - start


def main(a: Arguments) -> None:
    dense = opened(a.dense or fetch_smollm2())
    models = {"dense": dense, "quantized": load(a.quantized) if a.quantized else rounded(dense, a.group)}
    for batch in a.batch:
        measure(a, models, batch)


def measure(a: Arguments, models: dict[str, Model], batch: int) -> None:
    prompt = jnp.ones((batch, a.prompt), jnp.int32)
    first: dict[str, list[float]] = {name: [] for name in models}
    token: dict[str, list[float]] = {name: [] for name in models}
    for run in range(a.runs + 1):
        for name, model in models.items():
            one, many = seconds(model, prompt, 1), seconds(model, prompt, a.tokens)
            if run:
                first[name].append(one)
                token[name].append((many - one) / (a.tokens - 1))
    ratio = statistics.median(d / q for d, q in zip(token["dense"], token["quantized"], strict=True))
    result = {
        name: {
            "first_token_s": statistics.median(first[name]),
            "tokens_per_second": batch / statistics.median(token[name]),
        }
        for name in models
    }
    table = Table("", "first token, s", "tokens/s", title=f"Batch {batch}, prompt {a.prompt}, {a.tokens} new tokens")
    for name, of in result.items():
        table.add_row(name, f"{of['first_token_s']:.3f}", f"{of['tokens_per_second']:.1f}")
    Console().print(table, f"Quantized over dense: {ratio:.2f}")
    sizes = {
        "batch": batch,
        "prompt": a.prompt,
        "tokens": a.tokens,
        "dtype": jnp.dtype(models["dense"].config.dtype).name,
    }
    name = a.name if len(a.batch) == 1 else f"{a.name}_batch_{batch}"
    save(name, sizes | {"models": result, "quantized_over_dense": ratio})


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

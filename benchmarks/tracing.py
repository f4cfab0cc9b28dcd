"""Seconds and memory of finding sites and folds in a Llama of 8B's shapes, unrolled and scanned; nothing is computed.

  python benchmarks/tracing.py

Each way runs in a process of its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))


@dataclass(frozen=True)
class Arguments:
    layers: int = 32
    width: int = 4096
    mlp: int = 14336
    heads: int = 32
    kv_heads: int = 8
    tokens: int = 512
    name: str = "tracing"
    """Of the JSON file under benchmarks/results."""
    worker: Literal["", "unrolled", "scanned"] = ""
    """Trace here and print the figures as JSON."""


def work(a: Arguments) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    import awq_jax as awq
    from awq_jax.models import decoder, for_config

    hf = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": a.width,
        "intermediate_size": a.mlp,
        "num_hidden_layers": 1 if a.worker == "scanned" else a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
    config = for_config(hf).config(hf)
    tokens = jax.ShapeDtypeStruct((1, a.tokens), jnp.int32)
    model = decoder.Decoder(config)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    fn = lambda params, tokens: model.apply({"params": params}, tokens)
    if a.worker == "scanned":
        block = decoder.Block(config.layers[0])
        hidden = jax.ShapeDtypeStruct((1, a.tokens, a.width), jnp.float32)
        layer = jax.eval_shape(block.init, jax.random.key(0), hidden)["params"]
        stack = jax.tree.map(lambda s: jax.ShapeDtypeStruct((a.layers, *s.shape), s.dtype), layer)

        def fn(params, tokens):
            h = decoder.embed(config, params[0], tokens)
            h, _ = jax.lax.scan(lambda h, p: (decoder.block(config.layers[0], p, h), None), h, params[1])
            return decoder.head(config, params[0], h)

        params = (params, stack)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    start = time.perf_counter()
    found = awq.sites(fn, params, tokens)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {
        "seconds": seconds,
        "peak_gb": peak,
        "added_gb": peak - before,
        "sites": len(found.sites),
        "folds": len(found.folds),
    }


def main(a: Arguments) -> None:
    if a.worker:
        print(json.dumps(work(a)))
        return
    from common import save

    table = Table("way", "seconds", "peak GB", "of it tracing", "sites", "folds", title="Finding sites and folds")
    rows = {}
    for way in ("scanned", "unrolled"):
        sizes = [
            f"--{k}={getattr(a, k.replace('-', '_'))}"
            for k in ("layers", "width", "mlp", "heads", "kv-heads", "tokens")
        ]
        command = [sys.executable, __file__, "--worker", way, *sizes]
        rows[way] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        r = rows[way]
        cells = (f"{r['seconds']:.1f}", f"{r['peak_gb']:.2f}", f"{r['added_gb']:.2f}", str(r["sites"]), str(r["folds"]))
        table.add_row(way, *cells)
    Console().print(table)
    save(a.name, rows)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

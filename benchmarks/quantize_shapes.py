"""Seconds and memory of quantizing a decoder of given sizes with random weights, on the device jax finds.

  python benchmarks/quantize_shapes.py CONFIG.json [--tokens 16384] [--name quantize_8b]

Weights are drawn where they are needed, layer by layer, as a checkpoint would be read, so that no disk is timed; the
packed layers stay on the device. Compilation is in the seconds.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent))
from common import save

from awq_jax.models import for_config
from awq_jax.presets import PRESETS
from awq_jax.stream import Decoder, stream


@dataclass(frozen=True)
class Arguments:
    config: Annotated[Path, tyro.conf.Positional]
    tokens: int = 16384
    seq_len: int = 512
    name: str = "quantize_shapes"
    """Of the JSON file under benchmarks/results."""


def main(a: Arguments) -> None:
    hf = json.loads(a.config.read_text())
    module = for_config(hf)
    config = module.Config.from_hf(hf, jnp.bfloat16)
    shapes = module.stored_shapes(config)
    draw = jax.jit(
        lambda seed, shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) / 50, static_argnums=1
    )
    read: Any = lambda name: draw(np.uint32(zlib.crc32(name.encode())), shapes[name])
    tokens = np.random.default_rng(0).integers(config.vocab, size=(a.tokens // a.seq_len, a.seq_len), dtype=np.int32)
    packed: dict[str, Any] = {}
    start = time.perf_counter()

    def keep(part: str, params: Any) -> None:
        packed[part] = jax.block_until_ready(params)
        weights = [w for name, w in packed.items() if name != "outer"]
        result = {
            "seconds": time.perf_counter() - start,
            "layers": f"{len(weights)} of {config.layers}",
            "tokens": a.tokens,
            "packed_gb": gigabytes(weights),
            "outer_gb": gigabytes(packed["outer"]),
            "peak_device_gb": ((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)) / 1e9,
        }
        # After each layer, so that a run that is cut short tells how far it came.
        save(a.name, result)
        print(result)

    stream(Decoder(module, config, read), tokens, PRESETS["default"], keep)


def gigabytes(tree: Any) -> float:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e9


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

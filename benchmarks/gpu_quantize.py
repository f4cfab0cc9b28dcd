"""Step "quantize": Llama-3-8B's shape streamed and in memory; a real model's codes on GPU and CPU; distillation.

The large shape has random weights, drawn layer by layer where they are needed, so that no disk is timed. The real model
is the SmolLM2 that `awq-jax demo` keeps in the user's cache; without it those rows say so. Compilation is in all
seconds.
"""

from __future__ import annotations

import functools as ft
import json
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from gpu_record import Record, Row
from gpu_smoke import TOY, TWO_LAYERS
from peers import parts

import awq_jax as awq
from awq_jax.cache import cache
from awq_jax.commands.demo import evaluation_text
from awq_jax.formats.checkpoint import open_checkpoint
from awq_jax.models import for_config
from awq_jax.models.family import param_shapes
from awq_jax.pipeline.calibration_text import calibration_tokens
from awq_jax.pipeline.decoder import lazy_params, outer, read, stream_decoder
from awq_jax.pipeline.distill_decoder import logits, together
from awq_jax.pipeline.load import load
from awq_jax.pipeline.quantize_checkpoint import quantize_checkpoint
from awq_jax.pipeline.score import score, windows
from awq_jax.transforms.presets import PRESETS
from awq_jax.transforms.recipe import Recipe
from awq_jax.transforms.stream import Lazy
from awq_jax.weights.paths import named_leaves
from awq_jax.weights.spec import QuantSpec, Rule
from awq_jax.weights.tensor import is_quantized, round_to_nearest


def random_decoder(hf: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A Config and lazy params."""
    config = for_config(hf).config(hf, jnp.bfloat16)
    draw = jax.jit(
        lambda seed, shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) / 50, static_argnums=1
    )
    lazy = lambda name, shape: Lazy(
        shape, jnp.dtype(jnp.bfloat16), lambda index: draw(np.uint32(zlib.crc32(name.encode())), shape)[index]
    )
    params = {name: lazy(name, shape) for name, shape in param_shapes(config).items()}
    return config, unflatten_dict(params, sep="/")


def random_tokens(vocab: int, number: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(vocab, size=(number // length, length), dtype=np.int32)


def gigabytes(tree: Any) -> float:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e9


def peak() -> Row:
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return Row("peak memory of the device since the step began", used / 1e9, "GB")


def streamed(config: Any, params: Any, tokens: np.ndarray, recipe: Recipe, record: Record) -> Iterator[Row]:
    start, packed = time.perf_counter(), {}

    def keep(part: str, params: Any) -> None:
        packed[part] = jax.block_until_ready(params)
        record.details.append({"part": part, "seconds": time.perf_counter() - start})
        record.write()
        if record.over():
            raise TimeoutError(f"{part} was done after {time.perf_counter() - start:.0f} s, the step's time was over")

    done = stream_decoder(config, params, tokens, recipe, keep)
    seconds = time.perf_counter() - start
    yield Row(f"streamed, {len(config.layers)} layers, {tokens.size} tokens", seconds, "s", 60, most=True)
    for stage, part in done.seconds.items():
        yield Row(f"streamed: {stage}", part, "s")
    yield Row("streamed: packed layers", gigabytes(packed), "GB")
    yield peak()


def in_memory(config: Any, lazy: Any, tokens: np.ndarray, recipe: Recipe) -> Iterator[Row]:
    """`calibrate` and `quantize` of the whole function, its layers scanned."""
    layers = together([read(lazy[f"layers_{i}"]) for i in range(len(config.layers))])
    params = {"outer": read(outer(lazy)), "layers": layers}
    jax.block_until_ready(params)
    recipe = replace(recipe, rules=(Rule("outer/", skip=True),))
    batches = [(jnp.asarray(tokens[k : k + 4]),) for k in range(0, len(tokens), 4)]
    start = time.perf_counter()
    calibration = awq.calibrate(logits(config), params, batches)
    jax.block_until_ready(calibration.moments)
    middle = time.perf_counter()
    jax.block_until_ready(awq.quantize(params, calibration, recipe)[0])
    yield Row("in memory: calibrate", middle - start, "s")
    yield Row("in memory: calibrate and quantize", time.perf_counter() - start, "s", 60, most=True)
    yield peak()


def on_cpu() -> Any:
    on_one = jax.default_backend() == "cpu"
    return nullcontext() if on_one else jax.default_device(jax.devices("cpu")[0])


def ties() -> Iterator[Row]:
    """Rounding to nearest on both: codes may differ where a weight lies between two of them."""
    w = np.random.default_rng(0).standard_t(4, size=(1024, 512)).astype(np.float32)
    q, s, z = parts(round_to_nearest(w, QuantSpec(4, 64)))
    with on_cpu():
        other, s_cpu, z_cpu = parts(round_to_nearest(w, QuantSpec(4, 64)))
    spread = lambda a: np.repeat(a, 64, axis=0)
    off = np.abs(np.abs(w / spread(s) + spread(z) - np.minimum(q, other)) - 0.5)
    yield Row("rounded: steps and zeros that differ", int(((s != s_cpu) | (z != z_cpu)).sum()), "", 0, most=True)
    yield Row("rounded: codes that differ", int((q != other).sum()), f"of {q.size}")
    yield Row("rounded: codes that differ and are no ties", int(((q != other) & (off > 1e-3)).sum()), "", 0, most=True)


def same_codes(model: Path, recipe: Recipe, layers: int, samples: int, length: int) -> Iterator[Row]:
    """The whole search in float32 on both devices. A tie decided otherwise moves the codes rounded after it."""
    checkpoint = open_checkpoint(model)
    family = for_config(checkpoint.config)
    whole = family.config(checkpoint.config)
    config = replace(whole, layers=whole.layers[:layers])
    params = lazy_params(checkpoint, family, config)
    tokens = calibration_tokens(None, checkpoint.tokenizer(), samples=samples, seq_len=length)

    def run() -> tuple[dict[str, Any], Any]:
        found: dict[str, Any] = {}
        with jax.default_matmul_precision("highest"):
            keep = found.__setitem__
            done = stream_decoder(config, params, tokens, recipe, keep, dtype=jnp.float32)
        return {name: w for name, w in named_leaves(found).items() if is_quantized(w)}, done.reports

    start = time.perf_counter()
    ours, reports = run()
    yield Row(f"search on the GPU, {layers} layers, {tokens.size} tokens", time.perf_counter() - start, "s")
    start = time.perf_counter()
    with on_cpu():
        theirs, reports_cpu = run()
    yield Row("search on the CPU", time.perf_counter() - start, "s")
    codes = [(parts(ours[name])[0], parts(theirs[name])[0]) for name in ours]
    steps = [np.abs(a.astype(int) - b) for a, b in codes]
    share = sum((d == 0).sum() for d in steps) / sum(d.size for d in steps)
    errors = [abs(a.error - b.error) / b.error for a, b in zip(reports, reports_cpu, strict=True) if b.error]
    yield Row("search: codes equal on GPU and CPU", float(share), "of all", 0.99)
    yield Row("search: codes more than a step apart", float(sum((d > 1).sum() for d in steps)))
    yield Row("search: sites' errors differ by at most", float(max(errors, default=0)), "", 0.01, most=True)


def distilled(model: Path, recipe: Recipe, samples: int, length: int, passes: int) -> Iterator[Row]:
    """KL on the packaged evaluation text before and after, and seconds."""
    dense = load(model, jnp.float32)
    texts = windows(evaluation_text(), dense.tokenizer, 8, length)
    for n in (0, passes):
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            start = time.perf_counter()
            options: Any = {"format": "orbax", "samples": samples, "seq_len": length, "distill": n}
            done = quantize_checkpoint(model, out, recipe, **options)
            yield Row(f"{n} passes of distillation: all", time.perf_counter() - start, "s")
            if n:
                yield Row(f"{n} passes of {samples * length} tokens", done.seconds["distillation"], "s")
            with jax.default_matmul_precision("highest"):
                kl = score(load(out, jnp.float32), texts, dense).kl
            yield Row(f"{n} passes of distillation: KL", kl, "nats a token")


def real_model(toy: bool, folder: str) -> Path:
    if toy:
        sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))
        from checkpoints import tiny_folder

        return tiny_folder(Path(folder) / "model", num_hidden_layers=1)
    if not (model := cache() / "smollm2-135m-instruct.gguf").exists():
        raise FileNotFoundError(f"{model} is not here: awq-jax demo fetches it")
    return model


def run(record: Record) -> None:
    toy = record.toy
    hf = TWO_LAYERS | TOY if toy else json.loads(Path(__file__).with_name("llama_3_8b.json").read_text())
    number, length = (64, 32) if toy else (16384, 512)
    model = random_decoder(hf)
    tokens = random_tokens(model[0].vocab, number, length)
    recipe = PRESETS["rtn" if toy else "default"]
    narrow = replace(recipe, group_size=32 if toy else 64)
    with tempfile.TemporaryDirectory() as folder:
        real = ft.cache(lambda: real_model(toy, folder))
        record.attempt("streamed", ft.partial(streamed, *model, tokens, recipe, record))
        record.attempt("ties", ties)
        sizes = (1, 2, 32) if toy else (2, 16, 512)
        record.attempt("codes on GPU and CPU", lambda: same_codes(real(), narrow, *sizes))
        record.attempt("in memory", lambda: in_memory(*model, tokens, recipe))
        # Three passes of the packaged text's 87,000 tokens: 260,000 are seen.
        sizes = (2, 32, 1) if toy else (170, 512, 3)
        record.attempt("distillation", lambda: distilled(real(), narrow, *sizes))

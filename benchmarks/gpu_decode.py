"""Step "decode": tokens a second of Llama-3-8B's shape, random weights, in bfloat16 and in 4 bits, and a prefill.

The prompt is one token, so that all of a program's time is that of steps like the last.
"""

from __future__ import annotations

import functools as ft
import json
import math
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import thunks
from decode import random_model, rounded
from gpu_record import Record, Row
from gpu_smoke import TOY, TWO_LAYERS

from awq_jax.models.decoder import init_cache
from awq_jax.models.generate import _generate
from awq_jax.pipeline.load import Model
from awq_jax.transforms.tune import timed
from awq_jax.weights.tensor import dot

BATCHES = (1, 4, 16)
NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}


def loop(model: Model, batch: int, tokens: int) -> Any:
    """Greedy decoding of `tokens` tokens after one, lowered."""
    prompt = jnp.ones((batch, 1), jnp.int32)
    return _generate.lower(model.config, model.params, prompt, None, max_new_tokens=tokens, eos=())


def seconds_a_token(program: Any, model: Model, batch: int, tokens: int) -> float:
    """Of one turn."""
    start = time.perf_counter()
    jax.block_until_ready(program(model.params, jnp.ones((batch, 1), jnp.int32), None))
    return (time.perf_counter() - start) / tokens


def bytes_read(model: Model, batch: int, tokens: int) -> int:
    """By a step: all weights but the embedding, of which a row is, and the cache, which is read as a whole."""
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    cache = jax.eval_shape(lambda: init_cache(model.config, batch, tokens))
    unread = 0 if model.config.tied else size(model.params["embed"])
    return size(model.params) - unread + sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(cache))


def decoded(
    models: dict[str, Model], programs: dict[str, Future[Any]], batch: int, tokens: int, record: Record
) -> Iterator[Row]:
    """The models take turns, so that what else the machine does falls on all; the first turn is not counted."""
    turns: dict[str, list[float]] = {name: [] for name in programs}
    of = lambda name: models["dense" if name == "dense" else "quantized"]
    for turn in range(2 if record.toy else 6):
        for name, program in programs.items():
            t = seconds_a_token(program.result(), of(name), batch, tokens)
            turns[name] += [t] if turn else []
    times = {name: statistics.median(found) for name, found in turns.items()}
    floors = {name: bytes_read(of(name), batch, tokens) / record.ceilings()["bytes_per_s"] for name in times}
    record.details.append({"batch": batch, "seconds_a_token": turns, "floors": floors})
    one = batch == 1
    for name, t in times.items():
        yield Row(f"batch {batch}, {name}", batch / t, "tokens/s")
    yield Row(f"batch {batch}: quantized", times["dense"] / times["quantized"], "x bf16", 3.0 if one else None)
    wanted = {"quantized": 0.75} if one else {}
    for name in ("dense", "quantized"):
        yield Row(f"batch {batch}, {name}", floors[name] / times[name], "of the roofline", wanted.get(name))
    if "no graphs" in times:
        yield Row("decoding in CUDA graphs", times["no graphs"] / times["quantized"], "x without", 1.0)


def captured(what: str, lowered: Any) -> Iterator[Row]:
    """Of the kernels in a program's loop, how many are in CUDA graphs."""
    kernels = [holder for holder, kind in thunks.launches_of(lowered) if kind == "kCustomCall"]
    inside = sum(holder == "kCommandBuffer" for holder in kernels)
    yield Row(f"{what}: {inside} of {len(kernels)} kernels in CUDA graphs", inside / max(1, len(kernels)), "", 1.0)


def of_two_layers(models: dict[str, Model]) -> Model:
    """The quantized model's first two: the same loop, quickly compiled."""
    small = models["quantized"]
    kept = {name: p for name, p in small.params.items() if not name.startswith("layers_") or int(name[7:]) < 2}
    return replace(small, config=replace(small.config, layers=small.config.layers[:2]), params=kept)


def scanned(model: Model, rows: int) -> Any:
    """A scan over a stack of layers' weights, lowered."""
    ws = [model.params[f"layers_{i}"]["attn"]["o"]["kernel"] for i in range(min(4, len(model.config.layers)))]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ws)
    x = jnp.ones((rows, ws[0].shape[0]), model.config.dtype)
    return jax.jit(lambda x, stack: jax.lax.scan(lambda x, w: (dot(x, w), None), x, stack)[0]).lower(x, stack)


def prefilled(models: dict[str, Model], tokens: int) -> Iterator[Row]:
    """One program a layer; `hidden` compiles it once for all."""
    prompt = jax.random.randint(jax.random.key(0), (1, tokens), 0, models["dense"].config.vocab)
    times = {name: timed(lambda model=model: model.hidden(prompt), 5) for name, model in models.items()}
    for name, t in times.items():
        yield Row(f"prefill of {tokens} tokens, {name}", t * 1e3, "ms")
    yield Row(f"prefill of {tokens} tokens: quantized", times["dense"] / times["quantized"], "x bf16", 0.95)


def run(record: Record) -> None:
    toy = record.toy
    hf = TWO_LAYERS | TOY if toy else json.loads(Path(__file__).with_name("llama_3_8b.json").read_text())
    tokens = 2 if toy else 128
    dense = random_model(hf)
    models = {"dense": dense, "quantized": rounded(dense, 64 if toy else 128)}
    record.add(Row("sizes", f"{len(dense.config.layers)} layers, {dense.config.width} wide, {tokens} tokens decoded"))
    record.attempt("decode loop", lambda: captured("decode loop", loop(of_two_layers(models), 1, tokens)))
    record.attempt("scan over layers", lambda: captured("scan over layers", scanned(models["quantized"], 1)))
    with ThreadPoolExecutor() as pool:
        # Compiled beside each other, those of one sequence first, while nothing is timed.
        waiting: dict[int, dict[str, Future[Any]]] = {}

        def begin(batch: int) -> Iterator[Row]:
            start = time.monotonic()
            made = {name: pool.submit(loop(model, batch, tokens).compile) for name, model in models.items()}
            if batch == 1 and not toy:
                without = loop(models["quantized"], batch, tokens)
                made["no graphs"] = pool.submit(without.compile, compiler_options=NO_GRAPHS)
            for future in made.values():
                future.result()
            waiting[batch] = made
            yield Row(f"batch {batch}: compiled", time.monotonic() - start, "s")

        for batch in BATCHES[:1] if toy else BATCHES:
            record.attempt(f"batch {batch}: compiled", ft.partial(begin, batch))
            if batch in waiting:
                find = ft.partial(decoded, models, waiting[batch], batch, tokens, record)
                record.attempt(f"batch {batch}", find)
            if batch == 1:
                record.attempt("prefill", ft.partial(prefilled, models, 32 if toy else 1024))

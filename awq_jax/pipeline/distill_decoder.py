"""Distillation of a whole decoder after its blocks were quantized one by one; all of it is in memory."""

from __future__ import annotations

import functools as ft
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from awq_jax.machine import fast_dtype
from awq_jax.memory import matmul_bytes, to_be_read
from awq_jax.models import decoder
from awq_jax.models.layer import Config
from awq_jax.pipeline.decoder import Progress, outer, read
from awq_jax.transforms.distill import distill

BATCH = 1024
"""Tokens a step."""
RATE = 1e-3


def refine(
    config: Config,
    dense: Mapping[str, Any],
    small: Mapping[str, Any],
    tokens: Int[np.ndarray, "n t"],
    *,
    passes: int,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """The params of a quantized decoder, their steps distilled against the dense one on `passes` over the tokens.

    Args:
      dense: its params, lazy; of those outside of the layers `small` has the same.
      progress: called with a stage, steps done and steps in all.
    """
    rows = rows_of_step(*tokens.shape)
    total = passes * (len(tokens) // rows)
    progress("distillation step", 0, total)
    rest = outer(small)
    layers = [name for name in small if name not in rest]
    done = iter(range(1, total + 1))
    tuned = distill(
        logits(replace(config, dtype=step_dtype())),
        {"outer": rest, "layers": together([read(dense[name]) for name in layers])},
        {"outer": rest, "layers": together([small[name] for name in layers])},
        ((jnp.asarray(tokens[rows_]),) for rows_ in shuffled(len(tokens), rows, passes)),
        rate=optax.linear_schedule(RATE, RATE / 10, total),
        progress=lambda loss: progress("distillation step", next(done), total),
    )
    return rest | dict(zip(layers, apart(tuned["layers"], len(layers)), strict=True))


def step_dtype() -> Any:
    """In which steps are computed; XLA's backward matmuls in bfloat16 are slow on every CPU."""
    return jnp.float32 if jax.default_backend() == "cpu" else fast_dtype()


def rows_of_step(n: int, t: int) -> int:
    """How many of `n` sequences of `t` tokens a step takes."""
    return max(1, min(BATCH // t, n))


def nbytes(config: Config, params: Any, n: int, t: int) -> int:
    """About what `refine` takes: all layers, twice while they are put together, and what a step computes and keeps.

    Args:
      params: jax.ShapeDtypeStructs of the dense model's.
      n, t: sequences, and tokens of each.
    """
    config = replace(config, dtype=step_dtype())
    rest = outer(params)
    layers = jax.eval_shape(together, [part for name, part in params.items() if name not in rest])
    tokens = jax.ShapeDtypeStruct((rows_of_step(n, t), t), jnp.int32)
    run = logits(config)
    loss = lambda layers, rest, tokens: run({"outer": rest, "layers": layers}, tokens).sum()
    hidden = jax.eval_shape(ft.partial(decoder.embed, config), rest, tokens)
    kept = len(config.layers) * hidden.size * hidden.dtype.itemsize
    return 2 * to_be_read(layers) + to_be_read(rest) + kept + matmul_bytes(jax.grad(loss), layers, rest, tokens)


def logits(config: Config) -> Callable[[Any, Array], Float[Array, "b t v"]]:
    """`(params, tokens) -> logits` of a decoder, its layers a stack or a list; blocks are computed again going back."""
    block = jax.checkpoint(decoder.block, static_argnums=0)

    def run(params: Any, tokens: Array) -> Array:
        hidden = decoder.embed(config, params["outer"], tokens)
        if isinstance(params["layers"], list):
            for layer, part in zip(config.layers, params["layers"], strict=True):
                hidden = block(layer, part, hidden)
        else:
            step = lambda h, part: (block(config.layers[0], part, h), None)
            hidden, _ = jax.lax.scan(step, hidden, params["layers"])
        return decoder.head(config, params["outer"], hidden)

    return run


def together(layers: list[Any]) -> Any:
    """Layers of one structure and one set of dtypes as a stack (one compiled block); others as a list."""
    alike = {(jax.tree.structure(layer), tuple((w.shape, w.dtype) for w in jax.tree.leaves(layer))) for layer in layers}
    return jax.tree.map(lambda *ws: jnp.stack(ws), *layers) if len(alike) == 1 else layers


def apart(layers: Any, n: int) -> list[Any]:
    """The inverse of `together`."""
    return layers if isinstance(layers, list) else [jax.tree.map(lambda w, i=i: w[i], layers) for i in range(n)]


def shuffled(n: int, rows: int, passes: int) -> Iterator[Int[np.ndarray, " rows"]]:
    """Numbers of the sequences of each step: every pass in an order of its own."""
    rng = np.random.default_rng(0)
    for _ in range(passes):
        order = rng.permutation(n)
        yield from (order[k : k + rows] for k in range(0, n - n % rows, rows))

"""Quantizes a model block by block: in memory are one block, its moments, and the calibration set's hidden states."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from awq_jax.moments import Moments
from awq_jax.quantize import SiteReport, quantize
from awq_jax.recipe import Recipe
from awq_jax.sites import sites
from awq_jax.transform import Calibration, quantized, with_importance, with_moments

Feed = Literal["dense", "quantized"]
CHUNK = 2048
"""Tokens that go through a block at once: enough to keep the matmuls busy, small beside a block's weights."""


@dataclass
class Clock:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Streamed:
    """What happened: a report for every site, seconds by stage."""

    reports: tuple[SiteReport, ...]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Decoder:
    """A model that is read layer by layer.

    Args:
      module: of awq_jax.models: `embed`, `block`, `head`, `layer_params`, `outer_params`.
      config: the module's Config.
      read: tensor by checkpoint name.
    """

    module: Any
    config: Any
    read: Callable[[str], Any]

    def layer(self, i: int) -> Any:
        return jax.tree.map(jnp.asarray, self.module.layer_params(self.read, self.config, i))


def stream(
    model: Decoder,
    tokens: Int[np.ndarray, "n t"],
    recipe: Recipe,
    write: Callable[[str, Any], None],
    *,
    feed: Feed = "dense",
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Streamed:
    """Quantize every block of a decoder and hand each over as soon as it is done.

    Args:
      tokens: calibration sequences of equal length.
      recipe: with `importance`, blocks are done last to first, after one pass that keeps every block's input.
      write: called with ("outer", params) and with ("layers_<i>", params) for each block.
      feed: whether a block is calibrated on what the dense blocks before it give, or the quantized ones.
      progress: called with a stage, blocks done and blocks in all.
    """
    clock = Clock()
    with clock("load"):
        outer = model.module.outer_params(model.read, model.config)
        rows = max(1, CHUNK // tokens.shape[1])
        chunks = [jnp.asarray(tokens[k : k + rows]) for k in range(0, len(tokens), rows)]
        hidden = [model.module.embed(model.config, outer, chunk) for chunk in chunks]
    with clock("write"):
        write("outer", outer)
    block = partial(model.module.block, model.config)
    traced = sites(block, model.layer(0), hidden[0])

    def finish(i: int, params: Any, moments: dict[str, Moments], example: Array) -> tuple[Any, tuple[SiteReport, ...]]:
        name = f"layers_{i}"
        with clock("search"):
            calibration = Calibration(block, traced, moments, (example[:1, :64],))
            qparams, found = named_errors(name, lambda: quantize(params, calibration, recipe))
            jax.block_until_ready(qparams)
        with clock("write"):
            write(name, qparams)
        return qparams, tuple(replace(r, name=f"{name}/{r.name}") for r in found)

    if recipe.importance:
        reports = _backward(model, outer, block, traced, hidden, recipe, finish, clock, progress)
    else:
        del outer
        reports = _forward(model, block, traced, hidden, recipe, finish, feed, clock, progress)
    return Streamed(reports, clock.seconds)


def _forward(
    model: Decoder, block: Any, traced: Any, hidden: list[Array], recipe: Recipe, finish: Any, feed: Feed, clock: Clock,
    progress: Any,
) -> tuple[SiteReport, ...]:  # fmt: skip
    """First block to last, each from the hidden states that the one before it left."""
    observe = jax.jit(with_moments(block, traced, block=recipe.gram_block))
    again = jax.jit(quantized(block))
    reports: list[SiteReport] = []
    for i in range(model.config.layers):
        progress("block", i, model.config.layers)
        with clock("load"):
            params = model.layer(i)
        inputs, moments = (list(hidden) if feed == "quantized" else hidden[:1]), None
        with clock("statistics"):
            for k, h in enumerate(hidden):
                hidden[k], new = observe(params, h)
                moments = new if moments is None else add(moments, new)
            jax.block_until_ready(moments)
        qparams, found = finish(i, params, moments, inputs[0])
        if feed == "quantized":
            with clock("statistics"):
                hidden = [again(qparams, h) for h in inputs]
        reports += found
    progress("block", model.config.layers, model.config.layers)
    return tuple(reports)


def _backward(
    model: Decoder, outer: Any, block: Any, traced: Any, hidden: list[Array], recipe: Recipe, finish: Any, clock: Clock,
    progress: Any,
) -> tuple[SiteReport, ...]:  # fmt: skip
    """Last block to first, each with its inputs from a forward pass and its outputs' gradients from the block after."""
    layers = model.config.layers
    step = jax.jit(block)
    observe = jax.jit(with_importance(block, traced, block=recipe.gram_block))
    gradient = jax.jit(partial(label_gradient, partial(model.module.head, model.config)))
    with tempfile.TemporaryFile() as file:
        shape = (layers, len(hidden), *hidden[0].shape)
        kept = np.memmap(file, jnp.bfloat16, "w+", shape=shape)
        with clock("forward"):
            for i in range(layers):
                progress("forward", i, layers)
                params = model.layer(i)
                for k, h in enumerate(hidden):
                    kept[i, k, : len(h)] = np.asarray(h.astype(jnp.bfloat16))
                    hidden[k] = step(params, h)
            sizes = [len(h) for h in hidden]
            keys = jax.random.split(jax.random.key(0), len(hidden))
            cotangents = [gradient(outer, h, key) for h, key in zip(hidden, keys, strict=True)]
            jax.block_until_ready(cotangents)
        progress("forward", layers, layers)
        reports: list[SiteReport] = []
        for i in reversed(range(layers)):
            progress("block", layers - 1 - i, layers)
            with clock("load"):
                params = model.layer(i)
            moments = None
            with clock("statistics"):
                for k, g in enumerate(cotangents):
                    h = jnp.asarray(kept[i, k, : sizes[k]]).astype(g.dtype)
                    new, cotangents[k] = observe(params, h, g)
                    moments = new if moments is None else add(moments, new)
                jax.block_until_ready(moments)
            _, found = finish(i, params, moments, h)
            reports = [*found, *reports]
        progress("block", layers, layers)
    return tuple(reports)


def add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def label_gradient(
    head: Callable[..., Any], outer: Any, hidden: Float[Array, "b t h"], key: Array
) -> Float[Array, "b t h"]:
    """Gradient, with respect to the last hidden states, of the log likelihood of tokens that the model samples."""

    def one(args: tuple[Array, Array]) -> Array:
        h, key = args

        def likelihood(h: Array) -> Array:
            logits = head(outer, h)
            token = jax.random.categorical(key, jax.lax.stop_gradient(logits))
            return jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], -1).sum()

        return jax.grad(likelihood)(h)

    b, t, width = hidden.shape
    part = next(n for n in (256, 128, 64, 32, 16, 8, 4, 2, 1) if b * t % n == 0)
    pieces = hidden.reshape(-1, part, width)
    return jax.lax.map(one, (pieces, jax.random.split(key, len(pieces)))).reshape(hidden.shape)


def named_errors(where: str, f: Callable[[], Any]) -> Any:
    """`f()`, its ValueErrors saying which block they are about."""
    try:
        return f()
    except ValueError as e:
        raise ValueError(f"{where}/{e}") from e

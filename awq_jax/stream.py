"""Quantizes a model block by block: in memory are one block, its moments, and the calibration set's hidden states."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from awq_jax.machine import fast_dtype
from awq_jax.moments import Moments
from awq_jax.quantize import SiteReport, quantize
from awq_jax.recipe import Recipe
from awq_jax.sites import Traced, sites
from awq_jax.transform import Calibration, quantized, with_importance, with_moments

Feed = Literal["dense", "quantized"]
CHUNK = 2048
"""Tokens that go through a block at once: enough to keep the matmuls busy, small beside a block's weights."""


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

    @cached_property
    def block(self) -> Callable[[Any, Array], Array]:
        """`(params of a layer, hidden) -> hidden`."""
        return partial(self.module.block, self.config)

    @property
    def layers(self) -> range:
        return range(self.config.layers)

    def layer(self, i: int) -> Any:
        return jax.tree.map(jnp.asarray, self.module.layer_params(self.read, self.config, i))


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


def stream(
    model: Decoder,
    tokens: Int[np.ndarray, "n t"],
    recipe: Recipe,
    write: Callable[[str, Any], None],
    *,
    feed: Feed = "dense",
    dtype: Any = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Streamed:
    """Quantize every block of a decoder and hand each over as soon as it is done.

    Args:
      tokens: calibration sequences of equal length.
      recipe: with `importance`, blocks are done last to first, after one pass that keeps every block's input on disk.
      write: called with ("outer", params) and with ("layers_<i>", params) for each block.
      feed: whether a block is calibrated on what the dense blocks before it give, or the quantized ones.
      dtype: of the activations at calibration; None for the faster one of float32 and bfloat16 on this machine.
      progress: called with a stage, blocks done and blocks in all.

    Raises:
      ValueError: non-finite weights, a fold that changed a block (both name the site), or `feed="quantized"` with
        `importance`, which needs the dense blocks' gradients.
    """
    if recipe.importance and feed == "quantized":
        raise ValueError("feed='quantized' with importance=True: gradients are those of the dense blocks; choose one.")
    clock = Clock()
    observed = replace(model, config=replace(model.config, dtype=dtype or fast_dtype()))
    with clock("load"):
        outer = model.module.outer_params(model.read, model.config)
        rows = max(1, CHUNK // tokens.shape[1])
        chunks = [jnp.asarray(tokens[k : k + rows]) for k in range(0, len(tokens), rows)]
        hidden = [model.module.embed(observed.config, outer, chunk) for chunk in chunks]
    with clock("write"):
        write("outer", outer)
    traced = sites(model.block, model.layer(0), hidden[0])
    reports: dict[int, list[SiteReport]] = {}

    def finish(layer: int, params: Any, moments: Any, example: Array) -> Any:
        name = f"layers_{layer}"
        with clock("search"):
            calibration = Calibration(model.block, traced, moments, (example[:1, :64].astype(model.config.dtype),))
            qparams, found = quantize_block(name, params, calibration, recipe)
        with clock("write"):
            write(name, qparams)
        reports[layer] = [replace(r, name=f"{name}/{r.name}") for r in found]
        progress("block", len(reports), len(model.layers))
        return qparams

    if recipe.importance:
        backward(observed, traced, recipe, hidden, outer, finish, clock, progress)
    else:
        del outer
        forward(observed, traced, recipe, hidden, feed, finish, clock)
    return Streamed(tuple(r for layer in model.layers for r in reports[layer]), clock.seconds)


def quantize_block(name: str, params: Any, calibration: Calibration, recipe: Recipe) -> Any:
    """`quantize`, its errors saying which block they are about."""
    try:
        return jax.block_until_ready(quantize(params, calibration, recipe, prefix=f"{name}/"))
    except ValueError as e:
        raise ValueError(f"{name}/{e}") from e


Finish = Callable[[int, Any, dict[str, Moments] | None, Array], Any]
"""`(layer, params, moments, an input) -> qparams`: quantizes and writes a block."""


def forward(
    model: Decoder, traced: Traced, recipe: Recipe, hidden: list[Array], feed: Feed, finish: Finish, clock: Clock
) -> None:
    """First block to last, each from the hidden states that the one before it left."""
    observe = jax.jit(with_moments(model.block, traced, block=recipe.gram_block))
    again = jax.jit(quantized(model.block))
    for layer in model.layers:
        with clock("load"):
            params = model.layer(layer)
        inputs, moments = (list(hidden) if feed == "quantized" else hidden[:1]), None
        with clock("statistics"):
            for k, h in enumerate(hidden):
                hidden[k], new = observe(params, h)
                moments = new if moments is None else add(moments, new)
            jax.block_until_ready(moments)
        qparams = finish(layer, params, moments, inputs[0])
        if feed == "quantized":
            with clock("statistics"):
                hidden = [again(qparams, h) for h in inputs]


def backward(
    model: Decoder,
    traced: Traced,
    recipe: Recipe,
    hidden: list[Array],
    outer: Any,
    finish: Finish,
    clock: Clock,
    progress: Callable[[str, int, int], None],
) -> None:
    """Last block to first, each with its inputs from a forward pass and its outputs' gradients from the block after."""
    step = jax.jit(model.block)
    observe = jax.jit(with_importance(model.block, traced, block=recipe.gram_block))
    gradient = jax.jit(partial(label_gradient, partial(model.module.head, model.config)))
    count = len(model.layers)
    with tempfile.TemporaryFile() as file:
        kept = np.memmap(file, jnp.bfloat16, "w+", shape=(count, len(hidden), *hidden[0].shape))
        sizes = [len(h) for h in hidden]
        with clock("forward"):
            for layer in model.layers:
                progress("forward", layer, count)
                params = model.layer(layer)
                for k, h in enumerate(hidden):
                    kept[layer, k, : sizes[k]] = np.asarray(h.astype(jnp.bfloat16))
                    hidden[k] = step(params, h)
            keys = jax.random.split(jax.random.key(0), len(hidden))
            cotangents = [gradient(outer, h, key) for h, key in zip(hidden, keys, strict=True)]
            jax.block_until_ready(cotangents)
        progress("forward", count, count)
        for layer in reversed(model.layers):
            with clock("load"):
                params = model.layer(layer)
            h, moments = hidden[0], None
            with clock("statistics"):
                for k, g in enumerate(cotangents):
                    h = jnp.asarray(kept[layer, k, : sizes[k]]).astype(g.dtype)
                    new, cotangents[k] = observe(params, h, g)
                    moments = new if moments is None else add(moments, new)
                jax.block_until_ready(moments)
            finish(layer, params, moments, h)


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

"""Quantizes a model block by block: in memory are one block, its moments, and the calibration set's hidden states."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from awq_jax.quantize import SiteReport, quantize
from awq_jax.recipe import Recipe
from awq_jax.sites import sites
from awq_jax.transform import Calibration, quantized, with_moments

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


def stream(
    model: Any,
    config: Any,
    read: Callable[[str], Any],
    tokens: Int[np.ndarray, "n t"],
    recipe: Recipe,
    write: Callable[[str, Any], None],
    *,
    feed: Feed = "dense",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Streamed:
    """Quantize every block of a decoder and hand each over as soon as it is done.

    Args:
      model: a module of awq_jax.models: `embed`, `block`, `layer_params`, `outer_params`.
      config: the model's Config.
      read: tensor by checkpoint name.
      tokens: calibration sequences of equal length.
      write: called with ("outer", params) and then ("layers_<i>", params) for each block.
      feed: whether a block is calibrated on what the dense blocks before it give, or the quantized ones.
      progress: called with blocks done and blocks in all.
    """
    clock = Clock()
    with clock("load"):
        outer = model.outer_params(read, config)
        rows = max(1, CHUNK // tokens.shape[1])
        hidden = [model.embed(config, outer, jnp.asarray(tokens[k : k + rows])) for k in range(0, len(tokens), rows)]
    with clock("write"):
        write("outer", outer)
    del outer
    block = partial(model.block, config)
    traced, observe, forward = None, None, jax.jit(quantized(block))
    reports: list[SiteReport] = []
    for layer in range(config.layers):
        progress(layer, config.layers)
        name = f"layers_{layer}"
        with clock("load"):
            params = jax.tree.map(jnp.asarray, model.layer_params(read, config, layer))
        with clock("statistics"):
            if traced is None or observe is None:
                traced = sites(block, params, hidden[0])
                observe = jax.jit(with_moments(block, traced, block=recipe.gram_block))
            example = (hidden[0][:1, :64],)
            moments, after = None, []
            for h in hidden:
                out, new = observe(params, h)
                moments = new if moments is None else jax.tree.map(jnp.add, moments, new)
                after.append(out)
            assert moments is not None
            jax.block_until_ready(moments)
        with clock("search"):
            calibration = Calibration(block, traced, moments, example)
            qparams, found = named_errors(name, lambda p=params, c=calibration: quantize(p, c, recipe))
            jax.block_until_ready(qparams)
        if feed == "quantized":
            with clock("statistics"):
                after = [forward(qparams, h) for h in hidden]
        hidden = after
        with clock("write"):
            write(name, qparams)
        reports += [replace(r, name=f"{name}/{r.name}") for r in found]
    progress(config.layers, config.layers)
    return Streamed(tuple(reports), clock.seconds)


def named_errors(where: str, f: Callable[[], Any]) -> Any:
    """`f()`, its ValueErrors saying which block they are about."""
    try:
        return f()
    except ValueError as e:
        raise ValueError(f"{where}/{e}") from e

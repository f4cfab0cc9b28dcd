"""Quantizes a model block by block: in memory are one block, its moments, and the calibration set's hidden states."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from awq_jax.machine import fast_dtype
from awq_jax.memory import check_memory, matmul_bytes
from awq_jax.search.moments import Moments
from awq_jax.tracing.sites import sites
from awq_jax.transforms.calibrate import Calibration, quantized, with_moments
from awq_jax.transforms.quantize import SiteReport, quantize
from awq_jax.transforms.recipe import Recipe

Feed = Literal["dense", "quantized"]
COMPILING = "compiling, once"
"""The stage in which the first block is."""
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
    start: float = field(default_factory=time.perf_counter)

    def rest(self, stage: str) -> None:
        """Count for `stage` what was counted for none since the clock was made."""
        uncounted = time.perf_counter() - self.start - sum(self.seconds.values())
        self.seconds[stage] = self.seconds.get(stage, 0.0) + uncounted

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Streamed:
    """What happened: a report for every site, seconds by stage, the largest activation met.

    That is the largest |h| of what goes from block to block, or of what the sites read as far as moments tell.
    """

    reports: tuple[SiteReport, ...]
    seconds: dict[str, float]
    largest: float


@jax.jit
def largest_activation(hidden: list[Array], moments: dict[str, Moments]) -> Float[Array, ""]:
    peaks = [*(jnp.abs(h).max() for h in hidden), *(m.large for m in moments.values())]
    return jnp.stack([peak.astype(jnp.float32) for peak in peaks]).max()


def quantize_block(name: str, params: Any, calibration: Calibration, recipe: Recipe) -> Any:
    """`quantize`, its errors saying which block they are about."""
    try:
        return jax.block_until_ready(quantize(params, calibration, recipe, prefix=f"{name}/"))
    except ValueError as e:
        raise ValueError(f"{name}/{e}") from e


def refuse_too_large(model: Decoder, outer: Any, layer: Any, chunks: Sequence[Array]) -> None:
    """Refuse, before any work, calibration sequences that memory does not hold."""
    hidden = jax.eval_shape(partial(model.module.embed, model.config), outer, chunks[0])
    t = chunks[0].shape[1]
    states = sum(chunk.size for chunk in chunks) * hidden.dtype.itemsize * hidden.shape[-1]
    needed = states + matmul_bytes(model.block, layer, hidden)
    what = f"Calibration on samples={sum(map(len, chunks))} sequences of seq_len={t} tokens"
    check_memory(what, needed, "give shorter ones, or fewer")


def stream(
    model: Decoder,
    tokens: Int[np.ndarray, "n t"],
    recipe: Recipe,
    write: Callable[[str, Any], None],
    *,
    feed: Feed = "dense",
    dtype: Any = None,
    solve: Callable[..., Any] = quantize_block,
    clock: Clock | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Streamed:
    """Quantize every block of a decoder and hand each over as soon as it is done.

    Args:
      tokens: calibration sequences of equal length.
      write: called with ("outer", params) and with ("layers_<i>", params) for each block.
      feed: whether a block is calibrated on what the dense blocks before it give, or the quantized ones.
      dtype: of the activations at calibration; None for the faster one of float32 and bfloat16 on this machine.
      solve: `(name, params, calibration, recipe) -> (params, reports)` of a block.
      clock: goes on counting; None for a new one.
      progress: called with a stage, blocks done and blocks in all.

    Raises:
      InputError: more or longer sequences than memory holds.
      ValueError: non-finite weights, or a fold that changed a block; both name the site.
    """
    clock = clock or Clock()
    observed = replace(model, config=replace(model.config, dtype=dtype or fast_dtype()))
    with clock("load"):
        outer = model.module.outer_params(model.read, model.config)
        rows = max(1, CHUNK // tokens.shape[1])
        chunks = [jnp.asarray(tokens[k : k + rows]) for k in range(0, len(tokens), rows)]
        first = model.layer(0)
        refuse_too_large(observed, outer, first, chunks)
        hidden = [model.module.embed(observed.config, outer, chunk) for chunk in chunks]
    with clock("write"):
        write("outer", outer)
    del outer
    progress(COMPILING, 0, 1)
    with clock("trace"):
        traced = sites(model.block, first, hidden[0])
    del first
    observe = jax.jit(with_moments(observed.block, traced, block=recipe.gram_block))
    again = jax.jit(quantized(observed.block))
    reports: list[SiteReport] = []
    largest = 0.0
    for layer in model.layers:
        name = f"layers_{layer}"
        with clock("load"):
            params = model.layer(layer)
        example = hidden[0][:1, :64].astype(model.config.dtype)
        inputs, moments = (list(hidden) if feed == "quantized" else []), {}
        with clock("statistics"):
            for k, h in enumerate(hidden):
                hidden[k], new = observe(params, h)
                moments = {group: moments[group] + m for group, m in new.items()} if moments else new
            largest = max(largest, float(largest_activation(hidden, moments)))
        with clock("search"):
            qparams, found = solve(name, params, Calibration(model.block, traced, moments, (example,)), recipe)
        if feed == "quantized":
            with clock("statistics"):
                hidden = jax.block_until_ready([again(qparams, h) for h in inputs])
        with clock("write"):
            write(name, qparams)
        reports += [replace(r, name=f"{name}/{r.name}") for r in found]
        progress(COMPILING, 1, 1)
        progress("block", layer + 1, len(model.layers))
    return Streamed(tuple(reports), clock.seconds, largest)

"""A decoder on disk as what `awq.stream` takes: a function, params that are read in their turn, batches of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Int

from awq_jax.formats.checkpoint import Checkpoint
from awq_jax.machine import fast_dtype
from awq_jax.models.decoder import hidden
from awq_jax.models.family import Family
from awq_jax.models.layer import Config
from awq_jax.transforms.recipe import Recipe
from awq_jax.transforms.stream import Lazy, Streamed, stream
from awq_jax.weights.paths import named_leaves
from awq_jax.weights.tensor import is_quantized

Progress = Callable[[str, int, int], None]
LAYER = "layers_"
"""What the names of layers begin with."""
COMPILING = "compiling, once"
"""The stage in which the first layer is."""
CHUNK = 2048
"""Tokens that go through the model at once: enough to keep the matmuls busy, small beside a layer's weights."""


def lazy_params(checkpoint: Checkpoint, family: Family, config: Config, *, wide: bool = False) -> dict[str, Any]:
    """The params of a dense checkpoint, each read when it is indexed.

    Args:
      family, config: see `awq_jax.models.for_config`.
      wide: half precision as float32, so that folding rounds nothing.
    """

    def lazy(name: str, of: jax.ShapeDtypeStruct) -> Lazy:
        half = of.dtype.itemsize == 2 and jnp.issubdtype(of.dtype, jnp.floating)
        dtype = jnp.dtype(jnp.float32) if wide and half else of.dtype
        part = lambda index: np.asarray(family.param(checkpoint.read, config, name)[index])
        return Lazy(of.shape, dtype, lambda index: part(index).astype(dtype, copy=False))

    found = named_leaves(checkpoint.shapes(family, config))
    return unflatten_dict({name: lazy(name, of) for name, of in found.items()}, sep="/")


def read(params: Any) -> Any:
    """Lazy params in JAX's memory."""
    return jax.tree.map(lambda w: jnp.asarray(w[...]), params)


def outer(params: Mapping[str, Any]) -> dict[str, Any]:
    """The params outside of the layers."""
    return {name: part for name, part in params.items() if not name.startswith(LAYER)}


def as_function(
    config: Config, params: Mapping[str, Any], tokens: Int[np.ndarray, "n t"]
) -> tuple[Callable[..., Array], dict[str, Any], Int[np.ndarray, "n t"]]:
    """`(fn, params, tokens)`: the last layer's hidden states as a function of the layers and the rows of the embedding.

    Of these there are only those that the tokens name, which are counted anew: memory need not hold the others.

    Args:
      config: its dtype is that of the activations.
    """
    rows, places = np.unique(tokens, return_inverse=True)
    embedding = params["embed"]["embedding"]
    named = Lazy((len(rows), *embedding.shape[1:]), embedding.dtype, lambda index: embedding[rows][index])
    layers = {name: part for name, part in params.items() if name.startswith(LAYER)}
    fn = partial(hidden, replace(config, vocab=len(rows)))
    return (
        fn,
        {"embed": {**params["embed"], "embedding": named}, **layers},
        places.reshape(tokens.shape).astype(np.int32),
    )


def chunks(tokens: Int[np.ndarray, "n t"]) -> list[tuple[Array]]:
    """Batches of about CHUNK tokens."""
    rows = rows_at_once(tokens.shape[1])
    return [(jnp.asarray(tokens[k : k + rows]),) for k in range(0, len(tokens), rows)]


def rows_at_once(seq_len: int) -> int:
    """How many sequences make about CHUNK tokens."""
    return max(1, CHUNK // seq_len)


def called(tokens: Int[np.ndarray, "n t"]) -> str:
    """What errors call calibration sequences."""
    return f"samples={len(tokens)} sequences of seq_len={tokens.shape[1]} tokens"


def stream_decoder(
    config: Config,
    params: Mapping[str, Any],
    tokens: Int[np.ndarray, "n t"],
    recipe: Recipe,
    write: Callable[[str, Any], None],
    *,
    dtype: Any = None,
    progress: Progress = lambda stage, done, total: None,
    **options: Any,
) -> Streamed:
    """Quantize every layer of a decoder and hand each over as soon as it is done, as `write("layers_3", params)`.

    Args:
      params: lazy.
      tokens: calibration sequences of equal length.
      dtype: of the activations at calibration; None for the faster one of float32 and bfloat16 on this machine.
      progress: called with a stage, layers done and layers in all.
      options: as for `stream`.
    """
    fn, given, named = as_function(replace(config, dtype=dtype or fast_dtype()), params, tokens)
    sink = by_layer(params, write, progress)
    done = stream(fn, given, chunks(named), recipe, sink, called=called(tokens), **options)
    return replace(done, reports=tuple(r for r in done.reports if r.name.startswith(LAYER)))


def by_layer(
    params: Mapping[str, Any], write: Callable[[str, Any], None], progress: Progress, stage: str = "block"
) -> Callable[[str, Any], None]:
    """A sink for `stream` that calls `write("layers_3", params)` for each layer of which all params are there."""
    missing = {part: len(named_leaves(layer)) for part, layer in params.items() if part.startswith(LAYER)}
    found: dict[str, dict[str, Any]] = {part: {} for part in missing}
    progress(COMPILING, 0, 1)

    def sink(name: str, leaf: Any) -> None:
        part, rest = name.split("/", 1)
        if part not in missing:
            return
        found[part][rest] = leaf
        if len(found[part]) == missing[part]:
            layer = unflatten_dict(found.pop(part), sep="/")
            write(part, jax.tree.map(lambda w: w, layer, is_leaf=is_quantized))  # its keys sorted
            progress(COMPILING, 1, 1)
            progress(stage, len(missing) - len(found), len(missing))

    return sink

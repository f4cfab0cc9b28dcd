"""Reading and writing at places that other arrays tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from awq_jax.torch_bridge.operations.shapes import span
from awq_jax.torch_bridge.operations.table import operation


@operation("embedding")
def embedding(weight: Array, indices: Array, *_: Any) -> Array:
    return jnp.take(weight, indices, axis=0)


def key(indices: Sequence[Array | None]) -> tuple[Any, ...]:
    # torch takes uint8 for a mask too.
    if any(i is not None and i.dtype in (jnp.bool_, jnp.uint8) for i in indices):
        raise NotImplementedError("a mask as an index, which gives as many elements as the values say")
    return tuple(slice(None) if i is None else i for i in indices)


@operation("index", "_unsafe_index")
def index(x: Array, indices: Sequence[Array | None]) -> Array:
    return x[key(indices)]


@operation("index_put", "_unsafe_index_put")
def index_put(x: Array, indices: Sequence[Array | None], values: Array, accumulate: bool = False) -> Array:
    if len(indices) == 1 and indices[0] is not None and indices[0].dtype == jnp.bool_ and values.size == 1:
        mask = indices[0].reshape(indices[0].shape + (1,) * (x.ndim - indices[0].ndim))
        one = values.reshape(()).astype(x.dtype)
        return jnp.where(mask, x + one if accumulate else one, x)
    at = x.at[key(indices)]
    return at.add(values.astype(x.dtype)) if accumulate else at.set(values.astype(x.dtype))


@operation("index_select")
def index_select(x: Array, dim: int, places: Array) -> Array:
    return jnp.take(x, places, axis=dim)


@operation("index_add")
def index_add(x: Array, dim: int, places: Array, source: Array, alpha: float = 1) -> Array:
    source = source if alpha == 1 else alpha * source
    whole = (slice(None),) * (dim % x.ndim)
    return x.at[(*whole, places)].add(source.astype(x.dtype))


@operation("index_copy")
def index_copy(x: Array, dim: int, places: Array, source: Array) -> Array:
    return x.at[(*(slice(None),) * (dim % x.ndim), places)].set(source.astype(x.dtype))


@operation("index_fill")
def index_fill(x: Array, dim: int, places: Array, value: Any) -> Array:
    return x.at[(*(slice(None),) * (dim % x.ndim), places)].set(value)


@operation("gather")
def gather(x: Array, dim: int, places: Array, sparse_grad: bool = False) -> Array:
    if places.ndim and any(
        p != n for k, (p, n) in enumerate(zip(places.shape, x.shape, strict=True)) if k != dim % x.ndim
    ):
        return x[grid(places, dim)]
    return jnp.take_along_axis(x, places, dim)


def grid(places: Array, dim: int) -> tuple[Array, ...]:
    """The places themselves along `dim`, counted along the other axes."""
    found = list(jnp.meshgrid(*[jnp.arange(n) for n in places.shape], indexing="ij"))
    found[dim] = places
    return tuple(found)


@operation("scatter.value", "scatter.src")
def scatter(x: Array, dim: int, places: Array, source: Any, /) -> Array:
    return x.at[grid(places, dim)].set(_as_large(source, places, x))


@operation("scatter_add")
def scatter_add(x: Array, dim: int, places: Array, source: Array) -> Array:
    return x.at[grid(places, dim)].add(_as_large(source, places, x))


def _as_large(source: Any, places: Array, x: Array) -> Array:
    """As much of `source` as there are places."""
    source = jnp.asarray(source, x.dtype)
    return source[tuple(slice(n) for n in places.shape)] if source.ndim else source


@operation("slice_scatter")
def slice_scatter(
    x: Array, source: Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Array:
    first, last = span(x.shape[dim], start, end)
    return x.at[(*(slice(None),) * (dim % x.ndim), slice(first, last, step))].set(source.astype(x.dtype))


@operation("select_scatter")
def select_scatter(x: Array, source: Array, dim: int, index: int) -> Array:
    return x.at[(*(slice(None),) * (dim % x.ndim), index)].set(source.astype(x.dtype))


@operation("masked_scatter")
def masked_scatter(x: Array, mask: Array, source: Array) -> Array:
    """The elements of `source`, one after the other, where the mask is set."""
    mask = jnp.broadcast_to(mask, x.shape).reshape(-1)
    nth = jnp.maximum(jnp.cumsum(mask) - 1, 0)
    return jnp.where(mask, source.reshape(-1)[nth].astype(x.dtype), x.reshape(-1)).reshape(x.shape)

"""What ranks and counts, as routers do."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from awq_jax.torch_bridge.operations.table import operation


@operation("topk")
def topk(x: Array, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> list[Array]:
    if not largest:
        return [lax.slice_in_dim(part, 0, k, axis=dim) for part in sort(x, dim)]
    return [jnp.moveaxis(part, -1, dim) for part in lax.top_k(jnp.moveaxis(x, dim, -1), k)]


@operation("sort")
def sort(x: Array, dim: int = -1, descending: bool = False) -> list[Array]:
    places = jnp.argsort(x, dim, stable=True, descending=descending)
    return [jnp.take_along_axis(x, places, dim), places]


@operation("sort.stable")
def sort_stable(x: Array, stable: bool | None = None, dim: int = -1, descending: bool = False) -> list[Array]:
    return sort(x, dim, descending)


@operation("argsort")
def argsort(x: Array, dim: int = -1, descending: bool = False) -> Array:
    return sort(x, dim, descending)[1]


@operation("argsort.stable")
def argsort_stable(x: Array, stable: bool, dim: int = -1, descending: bool = False) -> Array:
    return sort(x, dim, descending)[1]


@operation("histc")
def histc(x: Array, bins: int = 100, min: float = 0, max: float = 0) -> Array:
    """How many of x are in each of `bins` of one size from `min` to `max`, which the last one holds too."""
    x = x.reshape(-1)
    low, high = jnp.asarray(min, x.dtype), jnp.asarray(max, x.dtype)
    if min == max and x.size:  # the range of x, or around it where that is a single value
        low, high = jnp.min(x), jnp.max(x)
        low, high = jnp.where(low == high, low - 1, low), jnp.where(low == high, high + 1, high)
    at = jnp.minimum(jnp.floor((x - low) * bins / (high - low)), bins - 1)
    at = jnp.where((x >= low) & (x <= high), at, -1).astype(jnp.int32)
    return jnp.sum(at[:, None] == jnp.arange(bins), 0).astype(x.dtype)


@operation("searchsorted")
def searchsorted(
    boundaries: Array,
    x: Any,
    /,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Array | None = None,
) -> Array:
    if boundaries.ndim != 1 or sorter is not None:
        raise NotImplementedError("boundaries of several rows, or in no order")
    return jnp.searchsorted(boundaries, x, side="right" if right or side == "right" else "left")


@operation("bucketize")
def bucketize(x: Any, boundaries: Array, /, out_int32: bool = False, right: bool = False) -> Array:
    return searchsorted(boundaries, x, right=right)

"""Sums, means, extremes, and what accumulates along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from awq_jax.torch_bridge.operations.shapes import axes
from awq_jax.torch_bridge.operations.table import operation

Dims = int | Sequence[int] | None


def wide(x: Array) -> Array:
    """Halves as singles, all else as it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def summable(x: Array, dtype: Any) -> Array:
    """As torch sums it: of `dtype` if one is named, integers and truth values else as the widest; halves as singles."""
    dtype = dtype or (x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else jax.dtypes.canonicalize_dtype(int))
    return x.astype(jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.inexact) else dtype)


@operation("sum")
def total(x: Array, dim: Dims = None, keepdim: bool = False, dtype: Any = None) -> Array:
    return jnp.sum(summable(x, dtype), axes(dim), keepdims=keepdim)


@operation("mean")
def mean(x: Array, dim: Dims = None, keepdim: bool = False, dtype: Any = None) -> Array:
    return jnp.mean(summable(x, dtype), axes(dim), keepdims=keepdim)


@operation("prod")
def product(x: Array, dtype: Any = None) -> Array:
    return jnp.prod(summable(x, dtype))


@operation("prod.dim_int")
def product_along(x: Array, dim: int, keepdim: bool = False, dtype: Any = None) -> Array:
    return jnp.prod(summable(x, dtype), dim, keepdims=keepdim)


@operation("amax")
def amax(x: Array, dim: Dims = (), keepdim: bool = False) -> Array:
    return jnp.max(x, axes(dim), keepdims=keepdim)


@operation("amin")
def amin(x: Array, dim: Dims = (), keepdim: bool = False) -> Array:
    return jnp.min(x, axes(dim), keepdims=keepdim)


@operation("max.dim")
def max_along(x: Array, dim: int, keepdim: bool = False) -> list[Array]:
    return [jnp.max(x, dim, keepdims=keepdim), jnp.argmax(x, dim, keepdims=keepdim)]


@operation("min.dim")
def min_along(x: Array, dim: int, keepdim: bool = False) -> list[Array]:
    return [jnp.min(x, dim, keepdims=keepdim), jnp.argmin(x, dim, keepdims=keepdim)]


operation("max")(jnp.max)
operation("min")(jnp.min)


@operation("argmax")
def argmax(x: Array, dim: int | None = None, keepdim: bool = False) -> Array:
    return jnp.argmax(x, dim, keepdims=keepdim)


@operation("argmin")
def argmin(x: Array, dim: int | None = None, keepdim: bool = False) -> Array:
    return jnp.argmin(x, dim, keepdims=keepdim)


@operation("any")
def any_of(x: Array, dim: Dims = None, keepdim: bool = False) -> Array:
    return jnp.any(x, axes(dim), keepdims=keepdim)


@operation("all")
def all_of(x: Array, dim: Dims = None, keepdim: bool = False) -> Array:
    return jnp.all(x, axes(dim), keepdims=keepdim)


@operation("var.correction")
def var_corrected(x: Array, dim: Dims = None, correction: int | None = 1, keepdim: bool = False) -> Array:
    return jnp.var(x, axes(dim), ddof=1 if correction is None else correction, keepdims=keepdim)


@operation("std.correction")
def std_corrected(x: Array, dim: Dims = None, correction: int | None = 1, keepdim: bool = False) -> Array:
    return jnp.sqrt(var_corrected(wide(x), dim, correction, keepdim))


@operation("cumsum")
def cumsum(x: Array, dim: int, dtype: Any = None) -> Array:
    return jnp.cumsum(summable(x, dtype), dim)


@operation("cumprod")
def cumprod(x: Array, dim: int, dtype: Any = None) -> Array:
    return jnp.cumprod(summable(x, dtype), dim)


@operation("linalg_vector_norm")
def vector_norm(x: Array, ord: float = 2, dim: Dims = None, keepdim: bool = False, dtype: Any = None) -> Array:
    x = wide(x if dtype is None else x.astype(dtype))
    if ord == 1:
        return jnp.sum(jnp.abs(x), axes(dim), keepdims=keepdim)
    if ord == 2:
        return jnp.sqrt(jnp.sum(jnp.square(x), axes(dim), keepdims=keepdim))
    raise NotImplementedError(f"a norm of order {ord}")


@operation("softmax")
def softmax(x: Array, dim: int, dtype: Any = None) -> Array:
    return jax.nn.softmax(x.astype(dtype) if dtype else x, dim)


@operation("log_softmax")
def log_softmax(x: Array, dim: int, dtype: Any = None) -> Array:
    return jax.nn.log_softmax(x.astype(dtype) if dtype else x, dim)


@operation("_softmax")
def softmax_of_half(x: Array, dim: int, half_to_float: bool) -> Array:
    return softmax(x, dim, jnp.float32 if half_to_float else None)


@operation("_log_softmax")
def log_softmax_of_half(x: Array, dim: int, half_to_float: bool) -> Array:
    return log_softmax(x, dim, jnp.float32 if half_to_float else None)


@operation("logsumexp")
def logsumexp(x: Array, dim: Dims, keepdim: bool = False) -> Array:
    return jax.nn.logsumexp(x, axes(dim), keepdims=keepdim)

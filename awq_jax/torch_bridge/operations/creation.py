"""Operations that make arrays. What torch leaves uninitialised is zero here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from awq_jax.torch_bridge.operations.table import operation

# Where torch's default dtype is meant, `dtype` is missing: what is made is then brought to the dtype that torch told.


@operation("full")
def full(size: Sequence[int], fill_value: Any, dtype: Any = None) -> Array:
    return jnp.full(tuple(size), fill_value, dtype)


@operation("full_like")
def full_like(x: Array, fill_value: Any, dtype: Any = None) -> Array:
    return jnp.full(x.shape, fill_value, dtype or x.dtype)


@operation("fill")
def fill(x: Array, value: Any) -> Array:
    return jnp.full(x.shape, value, x.dtype)


@operation("new_full")
def new_full(x: Array, size: Sequence[int], fill_value: Any, dtype: Any = None) -> Array:
    return jnp.full(tuple(size), fill_value, dtype or x.dtype)


@operation("zeros", "empty", "empty_permuted", "empty_strided")
def zeros(size: Sequence[int], _: Any = None, /, dtype: Any = None) -> Array:
    return jnp.zeros(tuple(size), dtype)


@operation("ones")
def ones(size: Sequence[int], dtype: Any = None) -> Array:
    return jnp.ones(tuple(size), dtype)


@operation("zeros_like", "empty_like", "zero")
def zeros_like(x: Array, dtype: Any = None) -> Array:
    return jnp.zeros(x.shape, dtype or x.dtype)


@operation("ones_like")
def ones_like(x: Array, dtype: Any = None) -> Array:
    return jnp.ones(x.shape, dtype or x.dtype)


@operation("new_zeros", "new_empty", "new_empty_strided")
def new_zeros(x: Array, size: Sequence[int], _: Any = None, /, dtype: Any = None) -> Array:
    return jnp.zeros(tuple(size), dtype or x.dtype)


@operation("new_ones")
def new_ones(x: Array, size: Sequence[int], dtype: Any = None) -> Array:
    return jnp.ones(tuple(size), dtype or x.dtype)


@operation("scalar_tensor")
def scalar_tensor(value: Any, /, dtype: Any = None) -> Array:
    return jnp.asarray(value, dtype)


@operation("arange")
def arange(end: float, dtype: Any = None) -> Array:
    return arange_from(0, end, dtype=dtype)


@operation("arange.start", "arange.start_step")
def arange_from(start: float, end: float, step: float = 1, dtype: Any = None) -> Array:
    if dtype is not None and jnp.issubdtype(dtype, jnp.integer):
        start, end, step = int(start), int(end), int(step)
    return jnp.asarray(np.arange(start, end, step), dtype)


@operation("linspace")
def linspace(start: Any, end: Any, steps: int, dtype: Any = None) -> Array:
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        return jnp.linspace(start, end, steps, dtype=dtype)
    # As torch: from whole ends, counted from the nearer one, and cut.
    start, end, k = int(start), int(end), np.arange(steps)
    step = (end - start) / max(steps - 1, 1)
    return jnp.asarray(np.where(k < max(steps // 2, 1), start + step * k, end - step * (steps - 1 - k)), dtype)


@operation("eye", "eye.m")
def eye(n: int, m: int | None = None, dtype: Any = None) -> Array:
    return jnp.eye(n, m, dtype=dtype)


@operation("one_hot")
def one_hot(x: Array, num_classes: int = -1) -> Array:
    if num_classes < 0:
        raise NotImplementedError("as many classes as the values say")
    return (x[..., None] == jnp.arange(num_classes)).astype(x.dtype)

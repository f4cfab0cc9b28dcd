"""Operations that only move elements."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from awq_jax.torch_bridge.operations.table import operation


def axes(dim: int | Sequence[int] | None) -> int | tuple[int, ...] | None:
    """torch's `dim` as numpy's `axis`: None and no dim at all are all of them."""
    if dim is None or isinstance(dim, int):
        return dim
    return tuple(dim) or None


@operation("view", "_unsafe_view", "reshape", "view_copy", "_reshape_copy")
def reshape(x: Array, shape: Sequence[int], /) -> Array:
    return x.reshape(tuple(shape))


@operation("view.dtype", "view_copy.dtype")
def bitcast(x: Array, dtype: np.dtype) -> Array:
    if jnp.dtype(dtype).itemsize != x.dtype.itemsize:
        raise NotImplementedError(f"{x.dtype} seen as {dtype}, which is not as wide")
    return lax.bitcast_convert_type(x, dtype)


@operation("flatten")
def flatten(x: Array, start_dim: int = 0, end_dim: int = -1) -> Array:
    start, end = (d % x.ndim for d in (start_dim, end_dim))
    return x.reshape(*x.shape[:start], -1, *x.shape[end + 1 :])


@operation("t", "t_copy", "numpy_T")
def transposed(x: Array) -> Array:
    return x.T


@operation("transpose", "transpose_copy")
def transpose(x: Array, dim0: int, dim1: int) -> Array:
    return jnp.swapaxes(x, dim0, dim1)


@operation("permute", "permute_copy")
def permute(x: Array, dims: Sequence[int]) -> Array:
    return jnp.transpose(x, tuple(dims))


@operation("movedim")
def movedim(x: Array, source: int | Sequence[int], destination: int | Sequence[int]) -> Array:
    return jnp.moveaxis(x, source, destination)


@operation("unsqueeze", "unsqueeze_copy")
def unsqueeze(x: Array, dim: int) -> Array:
    return jnp.expand_dims(x, dim)


@operation("squeeze", "squeeze_copy")
def squeeze(x: Array, dim: int | Sequence[int] | None = None) -> Array:
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    return jnp.squeeze(x, tuple(d for d in dims if x.shape[d] == 1))


@operation("expand", "expand_copy")
def expand(x: Array, size: Sequence[int], implicit: bool = False) -> Array:
    lead = len(size) - x.ndim
    return jnp.broadcast_to(x, tuple(x.shape[k - lead] if n == -1 else n for k, n in enumerate(size)))


@operation("select", "select_copy")
def select(x: Array, dim: int, index: int) -> Array:
    return lax.index_in_dim(x, index % x.shape[dim], dim, keepdims=False)


def span(n: int, start: int | None, end: int | None) -> tuple[int, int]:
    """Where a slice of an axis of size n starts and ends."""
    first, last, _ = slice(start, end).indices(n)
    return first, max(first, last)


@operation("slice", "slice_copy")
def slice_of(x: Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Array:
    first, last = span(x.shape[dim], start, end)
    whole = (first, last, step) == (0, x.shape[dim], 1)
    return x if whole else lax.slice_in_dim(x, first, last, step, dim)


@operation("narrow.default", "narrow_copy")
def narrow(x: Array, dim: int, start: int, length: int) -> Array:
    return slice_of(x, dim, start, start % x.shape[dim] + length)


@operation("cat")
def cat(tensors: Sequence[Array], dim: int = 0) -> Array:
    # torch lets one-dimensional empty tensors stand beside any others.
    some = [x for x in tensors if x.shape != (0,)] or list(tensors)
    wide = jnp.result_type(*tensors)
    return jnp.concatenate([x.astype(wide) for x in some], dim)


@operation("stack")
def stack(tensors: Sequence[Array], dim: int = 0) -> Array:
    return jnp.stack(tensors, dim)


@operation("split", "split_with_sizes", "split_copy", "split_with_sizes_copy")
def split(x: Array, size: int | Sequence[int], /, dim: int = 0) -> list[Array]:
    n = x.shape[dim]
    sizes = [min(size, n - k) for k in range(0, n, size)] if isinstance(size, int) else size
    at = np.cumsum([0, *sizes]).tolist()
    return [lax.slice_in_dim(x, a, b, 1, dim) for a, b in pairwise(at)]


@operation("chunk")
def chunk(x: Array, chunks: int, dim: int = 0) -> list[Array]:
    return split(x, max(1, -(-x.shape[dim] // chunks)), dim)


@operation("unbind", "unbind_copy")
def unbind(x: Array, dim: int = 0) -> list[Array]:
    return [lax.index_in_dim(x, k, dim, keepdims=False) for k in range(x.shape[dim])]


@operation("repeat")
def repeat(x: Array, repeats: Sequence[int]) -> Array:
    return jnp.tile(x, tuple(repeats))


@operation("repeat_interleave.self_int")
def repeat_interleave(x: Array, repeats: int, dim: int | None = None, output_size: int | None = None) -> Array:
    x, dim = (x.reshape(-1), 0) if dim is None else (x, dim % x.ndim)
    times = jnp.broadcast_to(jnp.expand_dims(x, dim + 1), (*x.shape[: dim + 1], repeats, *x.shape[dim + 1 :]))
    return times.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])


@operation("flip")
def flip(x: Array, dims: Sequence[int]) -> Array:
    return jnp.flip(x, tuple(dims))


@operation("roll")
def roll(x: Array, shifts: Sequence[int], dims: Sequence[int] = ()) -> Array:
    return jnp.roll(x, shifts, tuple(dims)) if dims else jnp.roll(x, shifts[0])


@operation("diagonal", "diagonal_copy")
def diagonal(x: Array, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Array:
    return jnp.diagonal(x, offset, dim1, dim2)


@operation("unfold", "unfold_copy")
def unfold(x: Array, dimension: int, size: int, step: int) -> Array:
    last = x.shape[dimension] - size
    parts = [lax.slice_in_dim(x, k, k + last // step * step + 1, step, dimension) for k in range(size)]
    return jnp.stack(parts, -1)


@operation("constant_pad_nd")
def constant_pad(x: Array, pad: Sequence[int], value: float = 0) -> Array:
    # From the last axis on, a pair each; negative ones cut.
    pairs = [(pad[k], pad[k + 1], 0) for k in range(0, len(pad), 2)][::-1]
    return lax.pad(x, jnp.asarray(value, x.dtype), [(0, 0, 0)] * (x.ndim - len(pairs)) + pairs)


@operation("tril")
def tril(x: Array, diagonal: int = 0) -> Array:
    return jnp.tril(x, diagonal)


@operation("triu")
def triu(x: Array, diagonal: int = 0) -> Array:
    return jnp.triu(x, diagonal)

"""Means and maxima over windows of the last axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from awq_jax.torch_bridge.operations.table import operation

Sizes = int | Sequence[int]


@operation("adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool3d")
def adaptive_avg_pool(x: Array, output_size: Sizes) -> Array:
    sizes = [output_size] if isinstance(output_size, int) else list(output_size)
    lead = x.shape[: x.ndim - len(sizes)]
    if any(n % size for n, size in zip(x.shape[len(lead) :], sizes, strict=True)):
        raise NotImplementedError(f"{x.shape} in {sizes} windows, which are not of one size")
    split = [part for n, size in zip(x.shape[len(lead) :], sizes, strict=True) for part in (size, n // size)]
    return x.reshape(*lead, *split).mean(tuple(range(len(lead) + 1, len(lead) + len(split), 2)))


def windows(x: Array, kernel: Sizes, stride: Sizes, padding: Sizes, ceil_mode: bool) -> dict[str, Any]:
    """What `lax.reduce_window` takes for windows of the last axes."""
    if ceil_mode:
        raise NotImplementedError("windows beyond the end")
    kernel = [kernel] if isinstance(kernel, int) else list(kernel)
    whole = lambda v: [v] * len(kernel) if isinstance(v, int) else list(v) * (len(kernel) // len(v))
    lead = x.ndim - len(kernel)
    return {
        "window_dimensions": (1,) * lead + tuple(kernel),
        "window_strides": (1,) * lead + tuple(whole(stride) if stride else kernel),
        "padding": ((0, 0),) * lead + tuple((p, p) for p in whole(padding)),
    }


@operation("avg_pool1d", "avg_pool2d")
def avg_pool(
    x: Array,
    kernel_size: Sizes,
    stride: Sizes = (),
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Array:
    over: Any = windows(x, kernel_size, stride, padding, ceil_mode)
    total = lax.reduce_window(x, jnp.zeros((), x.dtype), lax.add, **over)
    if divisor_override:
        return total / divisor_override
    ones = jnp.ones_like(x)
    if count_include_pad:
        ones, over = jnp.pad(ones, over["padding"], constant_values=1), over | {"padding": ((0, 0),) * x.ndim}
    return total / lax.reduce_window(ones, jnp.zeros((), x.dtype), lax.add, **over)


@operation("max_pool1d", "max_pool2d")
def max_pool(
    x: Array,
    kernel_size: Sizes,
    stride: Sizes = (),
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
) -> Array:
    if any(d != 1 for d in ([dilation] if isinstance(dilation, int) else dilation)):
        raise NotImplementedError("windows with gaps")
    over: Any = windows(x, kernel_size, stride, padding, ceil_mode)
    return lax.reduce_window(x, jnp.asarray(-jnp.inf, x.dtype), lax.max, **over)

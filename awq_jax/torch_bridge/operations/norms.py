"""Norms, in float32 where torch's are."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from awq_jax.torch_bridge.operations.reductions import wide
from awq_jax.torch_bridge.operations.table import operation


@operation("layer_norm")
def layer_norm(
    x: Array,
    normalized_shape: Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Array:
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    centred = wide(x) - jnp.mean(wide(x), axes, keepdims=True)
    y = centred * lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).astype(x.dtype)


@operation("rms_norm")
def rms_norm(x: Array, normalized_shape: Sequence[int], weight: Array | None = None, eps: float | None = None) -> Array:
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    eps = float(jnp.finfo(x.dtype).eps) if eps is None else eps
    y = wide(x) * lax.rsqrt(jnp.mean(jnp.square(wide(x)), axes, keepdims=True) + eps)
    return (y if weight is None else y * weight).astype(x.dtype)


@operation("group_norm")
def group_norm(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Array:
    groups = x.reshape(x.shape[0], num_groups, -1)
    y = layer_norm(groups, groups.shape[2:], eps=eps).reshape(x.shape)
    channels = (-1, *[1] * (x.ndim - 2))
    y = y if weight is None else y * weight.reshape(channels)
    return (y if bias is None else y + bias.reshape(channels)).astype(x.dtype)


@operation("batch_norm")
def batch_norm(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    mean: Array | None,
    var: Array | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Array:
    if training or mean is None or var is None:
        raise NotImplementedError("a batch norm by the batch's own statistics")
    channels = (-1, *[1] * (x.ndim - 2))
    y = (x - mean.reshape(channels)) * lax.rsqrt(var.reshape(channels) + eps)
    y = y if weight is None else y * weight.reshape(channels)
    return y if bias is None else y + bias.reshape(channels)

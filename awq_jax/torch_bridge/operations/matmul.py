"""Matmuls and convolutions. A linear's weight stays as torch has it, (out, in)."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from awq_jax.torch_bridge.operations.table import operation

operation("mm.default", "bmm.default", "matmul", "mv", "dot")(jnp.matmul)


@operation("linear")
def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    y = jnp.einsum("...i,oi->...o", x, weight)
    return y if bias is None else y + bias


@operation("addmm.default", "baddbmm.default")
def addmm(x: Array, a: Array, b: Array, beta: float = 1, alpha: float = 1) -> Array:
    y = jnp.matmul(a, b) if alpha == 1 else alpha * jnp.matmul(a, b)
    return y if beta == 0 else y + (x if beta == 1 else beta * x)


@operation("einsum.default")
def einsum(equation: str, tensors: Sequence[Array], path: Sequence[int] | None = None) -> Array:
    return jnp.einsum(equation, *tensors)


@operation("convolution")
def convolution(
    x: Array,
    weight: Array,
    bias: Array | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Array:
    n = x.ndim - 2
    stride, padding, dilation = (list(v) * n if len(v) == 1 else list(v) for v in (stride, padding, dilation))
    space = "DHW"[-n:]
    numbers = (f"NC{space}", f"OI{space}", f"NC{space}")
    if transposed:
        if groups != 1:
            raise NotImplementedError(f"a transposed convolution in {groups} groups")
        weight = jnp.flip(jnp.swapaxes(weight, 0, 1), range(2, weight.ndim))
        around = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
        pads = [
            (a, a + more) for a, more in zip(around, list(output_padding) * (n // len(output_padding)), strict=True)
        ]
        y = lax.conv_general_dilated(x, weight, (1,) * n, pads, stride, dilation, numbers)
    else:
        pads = [(p, p) for p in padding]
        y = lax.conv_general_dilated(x, weight, stride, pads, None, dilation, numbers, feature_group_count=groups)
    return y if bias is None else y + bias.reshape(-1, *[1] * n)

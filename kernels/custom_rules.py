"""What makes a kernel an operation like any other: gradients, vmap, programs for several platforms.

Inside out: a kernel where the program runs on CUDA and plain XLA where it does not; vmap, where a batched weight
becomes a weight with one more leading axis; gradients from plain XLA, which dequantizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Matmul = Callable[..., Any]


def everywhere(kernel: Matmul, plain: Matmul) -> Matmul:
    """`kernel` on CUDA, `plain` elsewhere, in one program."""
    return lambda *args: lax.platform_dependent(*args, cuda=kernel, default=plain)


def differentiable(matmul: Matmul, plain: Matmul) -> Matmul:
    """`matmul` with the gradients of `plain`."""
    with_gradients = jax.custom_vjp(lambda *args: matmul(*args))

    def backward(saved: Any, dy: Any) -> Any:
        return jax.vjp(plain, *saved)[1](dy)

    with_gradients.defvjp(lambda *args: (matmul(*args), args), backward)
    return with_gradients


def with_rules(matmul: Matmul, plain: Matmul, again: Matmul) -> Matmul:
    """`matmul(x, w)` that vmap and grad know; `again` is given the case that vmap makes of a case."""
    batchable = jax.custom_batching.custom_vmap(matmul)

    @batchable.def_vmap
    def rule(size: int, batched: Any, x: Any, w: Any) -> tuple[Any, bool]:
        x_batched, w_batched = batched
        lead = w.scales.ndim - 2
        if not any(jax.tree.leaves(w_batched)):
            return jnp.moveaxis(again(jnp.moveaxis(x, 0, lead), w), lead, 0), True
        spread = lambda leaf, is_batched: leaf if is_batched else jnp.broadcast_to(leaf, (size, *leaf.shape))
        return again(spread(x, x_batched), jax.tree.map(spread, w, w_batched)), True

    return differentiable(batchable, plain)


def with_rules_of(plain: Matmul, matmul: Matmul) -> Matmul:
    """`matmul` with the gradients of `plain`, which runs instead where it is vmapped."""
    batchable = jax.custom_batching.custom_vmap(matmul)

    @batchable.def_vmap
    def rule(size: int, batched: Any, *args: Any) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda b: 0 if b else None, batched)
        out = jax.vmap(plain, in_axes=tuple(axes), axis_size=size)(*args)
        return out, jax.tree.map(lambda _: True, out)

    return differentiable(batchable, plain)

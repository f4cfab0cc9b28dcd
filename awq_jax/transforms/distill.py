"""Distillation of the steps: codes and zero points stay, every group's step learns from the dense model's outputs.

What mlx-lm calls DWQ, for any function and on top of any search. The one stage that sees the model as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from awq_jax.compat import adam
from awq_jax.transforms.calibrate import Function, check_batch, quantized
from awq_jax.weights.tensor import SCALE_DTYPE, half_step, is_quantized, rounded_step

Loss = Callable[[Any, Any], Float[Array, ""]]


def kl_of_logits(dense: Float[Array, "*b v"], small: Float[Array, "*b v"]) -> Float[Array, ""]:
    """KL(dense || small) of the distributions that logits stand for, in nats, the mean over all but the last axis."""
    target, found = (jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)) for logits in (dense, small))
    return jnp.sum(jnp.exp(target) * (target - found), -1).mean()


def distill(
    fn: Function,
    params: Any,
    qparams: Any,
    batches: Iterable[tuple[Any, ...]],
    *,
    rate: optax.ScalarOrSchedule = 1e-3,
    loss: Loss = kl_of_logits,
    progress: Callable[[float], None] = lambda loss: None,
) -> Any:
    """`qparams` with the steps of their QuantizedTensors trained so that `quantized(fn)` gives what `fn` gives.

    Args:
      fn: pure function of (params, *inputs). Its backward pass runs: wrap blocks in `jax.checkpoint` to save memory.
      params: the dense params, the teacher.
      qparams: from `quantize`. Everything but the steps stays as it is.
      batches: tuples of inputs, one step of Adam each.
      rate: of a step relative to its size, or an optax schedule.
      loss: of (dense output, quantized output), which are whatever `fn` returns.
      progress: called after each step with its loss.

    Returns:
      params like `qparams`; the steps in the dtype they had.

    Raises:
      ValueError: a loss that is not finite, a batch that is no tuple, params without a QuantizedTensor.

    Example:
      >>> tuned = awq.distill(model.apply, params, qparams, [(tokens,) for tokens in batches])
    """
    if not any(map(is_quantized, jax.tree.leaves(qparams, is_leaf=is_quantized))):
        raise ValueError("distill: none of the params is a QuantizedTensor: give what awq.quantize returned.")
    optimizer = adam(rate, b2=0.99)
    factors = jax.tree.map(
        lambda w: jnp.zeros(w.scales.shape, jnp.float32) if is_quantized(w) else None, qparams, is_leaf=is_quantized
    )
    state = optimizer.init(factors)
    step = jax.jit(partial(_step, fn, optimizer, loss))
    for k, batch in enumerate(batches):
        check_batch(k, batch)
        factors, state, found = step(params, qparams, factors, state, tuple(batch))
        if not jnp.isfinite(found):
            raise ValueError(f"distill: the loss of batch {k + 1} is {float(found)}: lower the rate, mend the batch.")
        progress(float(found))
    return jax.tree.map(stored_like, qparams, with_factors(qparams, factors), is_leaf=is_quantized)


def stored_like(before: Any, w: Any) -> Any:
    """`w`, its steps rounded to the dtype they had before."""
    if not is_quantized(w):
        return w
    dtype = before.scales.dtype
    rounded = half_step if dtype == SCALE_DTYPE else rounded_step
    return replace(w, scales=rounded(w.scales).astype(dtype))


def with_factors(qparams: Any, factors: Any) -> Any:
    """Every QuantizedTensor's steps times 1 + its factors, float32."""

    def scaled(w: Any, factor: Any) -> Any:
        return w if factor is None else replace(w, scales=w.scales.astype(jnp.float32) * (1 + factor))

    return jax.tree.map(scaled, qparams, factors, is_leaf=is_quantized)


def _step(
    fn: Function,
    optimizer: Any,
    loss: Loss,
    params: Any,
    qparams: Any,
    factors: Any,
    state: Any,
    batch: tuple[Any, ...],
) -> tuple[Any, Any, Float[Array, ""]]:
    target = fn(params, *batch)
    small = quantized(fn)
    found, gradient = jax.value_and_grad(lambda f: loss(target, small(with_factors(qparams, f), *batch)))(factors)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(factors, updates), state, found

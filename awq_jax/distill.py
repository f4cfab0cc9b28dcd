"""Distillation: every group's step, and the codes if wanted, learn from the dense model's outputs.

With the steps alone it is what mlx-lm calls DWQ; with the codes, rounded straight through, and a block in the place of
the model, what AutoRound does (arXiv 2309.05516). For any function and on top of any search. The one stage that sees
the model as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from awq_jax.tensor import (
    QuantizedTensor,
    as_param,
    assemble,
    grouped_codes,
    is_quantized,
    stored_step,
    ungroup,
    zero_points,
)

Function = Callable[..., Any]
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
    code_rate: optax.ScalarOrSchedule = 0.0,
    loss: Loss = kl_of_logits,
    progress: Callable[[float], None] = lambda loss: None,
) -> Any:
    """`qparams` with the steps of their QuantizedTensors trained so that `quantized(fn)` gives what `fn` gives.

    Args:
      fn: pure function of (params, *inputs). Its backward pass runs: wrap blocks in `jax.checkpoint` to save memory.
      params: the dense params, the teacher.
      qparams: from `quantize`. Everything but steps and codes stays as it is.
      batches: tuples of inputs, one step of Adam each.
      rate: of a step relative to its size, or an optax schedule.
      code_rate: of a code, in units of one; 0 leaves the codes as they are and saves three floats a weight.
      loss: of (dense output, quantized output).
      progress: called after each step with its loss.

    Returns:
      params like `qparams`; the steps float16 as they were.

    Raises:
      ValueError: a loss that is not finite.

    Example:
      >>> tuned = awq.distill(model.apply, params, qparams, [(tokens,) for tokens in batches])
    """
    leaves, structure = jax.tree.flatten(qparams, is_leaf=is_quantized)
    learned = [_nothing_learned(w, bool(code_rate)) for w in leaves]
    rates: dict[Any, Any] = {"steps": optax.adam(rate, b2=0.99), "codes": optax.adam(code_rate, b2=0.99)}
    optimizer = optax.multi_transform(rates, [{name: name for name in part} for part in learned])
    state = optimizer.init(learned)
    step = jax.jit(partial(_step, fn, optimizer, loss, structure))
    for k, batch in enumerate(batches):
        learned, state, found = step(params, leaves, learned, state, tuple(batch))
        if not jnp.isfinite(found):
            raise ValueError(f"distill: the loss of batch {k + 1} is {float(found)}: lower the rate.")
        progress(float(found))
    return structure.unflatten([_stored(*pair) for pair in zip(leaves, learned, strict=True)])


def _nothing_learned(w: Any, codes: bool) -> dict[str, Array]:
    """Where training starts: changes of a QuantizedTensor's steps, as factors less 1, and of its codes."""
    if not is_quantized(w):
        return {}
    steps = {"steps": jnp.zeros(w.scales.shape)}
    return steps | {"codes": jnp.zeros(jax.eval_shape(grouped_codes, w).shape)} if codes else steps


def _learned(w: QuantizedTensor, learned: dict[str, Array]) -> tuple[Array, Array]:
    """Codes (*lead, groups, g, o), not yet rounded, and steps."""
    codes = jnp.clip(grouped_codes(w) + learned.get("codes", 0), 0, w.spec.levels)
    return codes, w.scales.astype(jnp.float32) * (1 + learned["steps"])


def _dense(w: Any, learned: dict[str, Array]) -> Any:
    """The weight that a QuantizedTensor stands for; gradients pass its rounding as if it were none."""
    if not is_quantized(w):
        return w
    codes, steps = _learned(w, learned)
    codes += jax.lax.stop_gradient(jnp.round(codes) - codes)
    grouped = (codes - zero_points(w)[..., None, :]) * steps[..., None, :]
    return as_param(ungroup(grouped, w.in_features), w)


def _stored(w: Any, learned: dict[str, Array]) -> Any:
    if not is_quantized(w):
        return w
    codes, steps = _learned(w, learned)
    kept = {"in_features": w.in_features, "dtype": w.dtype, "input_scale": w.input_scale, "layout": w.layout}
    return assemble(jnp.round(codes), stored_step(steps), zero_points(w), w.spec, **kept)


def _step(
    fn: Function,
    optimizer: Any,
    loss: Loss,
    structure: Any,
    params: Any,
    leaves: list[Any],
    learned: list[dict[str, Array]],
    state: Any,
    batch: tuple[Any, ...],
) -> tuple[Any, Any, Float[Array, ""]]:
    target = fn(params, *batch)
    small = lambda learned: fn(structure.unflatten(map(_dense, leaves, learned)), *batch)
    found, gradient = jax.value_and_grad(lambda learned: loss(target, small(learned)))(learned)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(learned, updates), state, found

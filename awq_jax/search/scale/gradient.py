"""Gradient descent on log s, channel by channel, through rounding as if it were not there (straight-through)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from awq_jax.compat import adam
from awq_jax.kernels.arithmetic import dequantized, ungrouped
from awq_jax.search.loss import output_error
from awq_jax.search.moments import Moments
from awq_jax.search.scale.grid import Grid, scale_error, some_columns
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import affine, group, group_ranges


@dataclass(frozen=True)
class Gradient:
    """The best scale met by Adam, from what `start` finds; on the columns that vote never worse than that.

    Args:
      rate: of log s.
      columns: at most so many columns of the weight, evenly spread, vote; 0 for all.
    """

    start: Callable[..., Any] = field(default_factory=Grid)
    iterations: int = 100
    rate: float = 0.01
    columns: int = 128

    def __call__(self, w: Float[Array, "i o"], moments: Moments, spec: QuantSpec) -> Float[Array, " i"]:
        first = jnp.log(self.start(w, moments, spec))
        w = some_columns(w, self.columns)
        optimizer = adam(self.rate)
        value_and_grad = jax.value_and_grad(lambda log_s: smooth_error(w, jnp.exp(log_s), moments, spec))

        def step(state: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], None]:
            log_s, optimizer_state, best, least = state
            error, gradient = value_and_grad(log_s)
            best, least = jnp.where(error < least, log_s, best), jnp.minimum(error, least)
            updates, optimizer_state = optimizer.update(gradient, optimizer_state)
            return (optax.apply_updates(log_s, updates), optimizer_state, best, least), None

        state = (first, optimizer.init(first), first, jnp.float32(jnp.inf))
        (_, _, best, _), _ = jax.lax.scan(step, state, length=self.iterations)
        errors = jnp.stack([scale_error(w, jnp.exp(s), moments, spec) for s in (first, best)])
        return jnp.exp(jnp.where(errors[1] < errors[0], best, first))


def smooth_error(w: Float[Array, "i o"], s: Float[Array, " i"], moments: Moments, spec: QuantSpec) -> Float[Array, ""]:
    """The output error of rounding `w * s` to nearest, with a gradient: rounding counts as the identity."""
    scaled = w * s[:, None]
    steps, zeros = affine(*group_ranges(scaled, spec), spec)
    levels = group(scaled, spec) / steps[..., None, :] + zeros[..., None, :]
    codes = straight_through(levels, spec)
    rounded = ungrouped(dequantized(codes, steps, zeros), len(w))
    return output_error((rounded - scaled) / s[:, None], moments).sum()


def straight_through(levels: Float[Array, "*b"], spec: QuantSpec) -> Float[Array, "*b"]:
    """Codes whose derivative is 1 inside the range and 0 outside."""
    inside = jnp.clip(levels, 0, spec.levels)
    return inside + jax.lax.stop_gradient(jnp.round(inside) - inside)

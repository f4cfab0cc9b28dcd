"""Golden-section search on the exponent of s = mean|x| ** r: fewer errors to compute than a grid as fine."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from awq_jax.search.moments import Moments
from awq_jax.search.scale.grid import floored, normalised, scale_error, sizes, some_columns
from awq_jax.weights.spec import QuantSpec

RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Golden:
    """The exponent between 0 and 1 that `iterations` sections leave; right where the error has one valley.

    Args:
      columns: at most so many columns of the weight, evenly spread, vote; 0 for all.
    """

    iterations: int = 8
    columns: int = 512

    def __call__(self, w: Float[Array, "i o"], moments: Moments, spec: QuantSpec) -> Float[Array, " i"]:
        w = some_columns(w, self.columns)
        statistic = floored(sizes(moments, "mean"))

        scale = lambda r: normalised(statistic**r)
        error = lambda r: scale_error(w, scale(r), moments, spec)

        def section(_: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            low, left, right, high, at_left, at_right = state
            lower = at_left < at_right
            low, high = jnp.where(lower, low, left), jnp.where(lower, right, high)
            new = jnp.where(lower, high - RATIO * (high - low), low + RATIO * (high - low))
            at_new = error(new)
            left, at_left, right, at_right = (
                jnp.where(lower, new, right),
                jnp.where(lower, at_new, at_right),
                jnp.where(lower, left, new),
                jnp.where(lower, at_left, at_new),
            )
            return low, left, right, high, at_left, at_right

        low, high = jnp.float32(0), jnp.float32(1)
        left, right = high - RATIO * (high - low), low + RATIO * (high - low)
        state = jax.lax.fori_loop(0, self.iterations, section, (low, left, right, high, error(left), error(right)))
        _, left, right, _, at_left, at_right = state
        return scale(jnp.where(at_left < at_right, left, right))

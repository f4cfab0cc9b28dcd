"""Ranges by importance: each weight's own error counts by its input's mean square, channels as if independent.

What llama.cpp does with an importance matrix, here for an asymmetric range.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from awq_jax.search.clip.shrink import Ranges
from awq_jax.search.moments import Moments
from awq_jax.search.scale.grid import sizes
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import affine, group, group_ranges, nearest


@dataclass(frozen=True)
class Importance:
    """For each shrunk range the weighted least-squares step for its codes; of those ranges the best.

    Args:
      ratios: fractions of a group's range that are tried.
    """

    ratios: tuple[float, ...] = tuple(1 - i / 20 for i in range(10))

    def __call__(self, w: Float[Array, "i o"], moments: Moments, spec: QuantSpec) -> Ranges:
        grouped = group(w, spec)
        importance = group(sizes(moments, "rms")[:, None] ** 2, spec)
        low, high = group_ranges(w, spec)

        def fitted(r: Float[Array, ""]) -> tuple[Float[Array, "groups o"], Ranges]:
            steps, zeros = affine(low * r, high * r, spec)
            level = nearest(grouped, steps, zeros, spec) - zeros[:, None]
            curve = (importance * level**2).sum(1)
            step = jnp.where(curve > 0, (importance * level * grouped).sum(1) / jnp.where(curve > 0, curve, 1), steps)
            step = jnp.where(low < high, jnp.clip(step, 0.8 * steps, 1.2 * steps), 0)
            error = (importance * (level * step[:, None] - grouped) ** 2).sum(1)
            return error, (-zeros * step, (spec.levels - zeros) * step)

        errors, ranges = jax.lax.map(fitted, jnp.array(self.ratios, jnp.float32))
        pick = jnp.argmin(errors, 0)[None]
        low, high = (jnp.take_along_axis(a, pick, 0)[0] for a in ranges)
        return low, high

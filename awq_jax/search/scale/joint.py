"""Scale and clip together: each candidate scale is scored after its own clip search."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from awq_jax.search.clip.shrink import Clip
from awq_jax.search.loss import group_blocks, group_error
from awq_jax.search.moments import Moments
from awq_jax.search.scale.grid import Grid, some_columns
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import group, round_trip


@dataclass(frozen=True)
class Joint:
    """The candidate of `grid` with the least error once `clip` has shrunk its ranges, rounded to nearest."""

    grid: Grid = field(default_factory=lambda: Grid(tuple(i / 10 for i in range(10)), columns=128))
    clip: Clip = field(default_factory=lambda: Clip((1.0, 0.9, 0.8, 0.7, 0.6)))

    def __call__(self, w: Float[Array, "i o"], moments: Moments, spec: QuantSpec) -> Float[Array, " i"]:
        w = some_columns(w, self.grid.columns)

        def error(s: Float[Array, " i"]) -> Float[Array, ""]:
            scaled, of_scaled = w * s[:, None], moments.scaled(1 / s)
            grouped = group(scaled, spec)
            rounded = round_trip(grouped, *self.clip(scaled, of_scaled, spec), spec)
            return group_error(rounded - grouped, group_blocks(of_scaled, spec)).sum()

        scales = self.grid.candidates(w, moments, spec)
        return scales[jnp.argmin(jax.lax.map(error, scales))]

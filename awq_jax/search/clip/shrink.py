"""Clip search: a group may lose its largest weights so that all others get a finer step."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from awq_jax.search.loss import group_blocks, group_error
from awq_jax.search.moments import Moments
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import group, group_ranges, round_trip

Ranges = tuple[Float[Array, "groups o"], Float[Array, "groups o"]]


@dataclass(frozen=True)
class Clip:
    """Shrinks each group's range by the ratio with the least output error.

    Args:
      ratios: fractions of the range that are tried, 1 first.
      mirrored: shrink [-max|w|, max|w|] and keep what of it the weights use, as llm-awq does; else both ends of
        [min, max] alike.
      ends: after both ends together, try the same ratios on each end alone.
    """

    ratios: tuple[float, ...] = tuple(1 - i / 20 for i in range(10))
    mirrored: bool = False
    ends: bool = False

    def __call__(self, w: Float[Array, "i o"], moments: Moments, spec: QuantSpec) -> Ranges:
        grouped, gram = group(w, spec), group_blocks(moments, spec)
        low, high = (end[None] for end in group_ranges(w, spec))
        widest = jnp.maximum(-low, high)

        def best(candidates: Ranges) -> Ranges:
            losses = jax.lax.map(
                lambda c: group_error(round_trip(grouped, c[0], c[1], spec) - grouped, gram), candidates
            )
            pick = jnp.argmin(losses, 0)[None]
            return tuple(jnp.take_along_axis(c, pick, 0) for c in candidates)  # type: ignore[return-value]

        r = jnp.array(self.ratios, jnp.float32)[:, None, None]
        fixed = jnp.ones_like(r)
        if self.mirrored:
            low, high = best((jnp.maximum(low, -widest * r), jnp.minimum(high, widest * r)))
        else:
            low, high = best((low * r, high * r))
            if self.ends:
                low, high = best((low * r, high * fixed))
                low, high = best((low * fixed, high * r))
        return low[0], high[0]


def no_clip(w: Float[Array, "i o"], moments: Moments, spec: QuantSpec) -> Ranges:
    """Each group's own range."""
    del moments
    return group_ranges(w, spec)

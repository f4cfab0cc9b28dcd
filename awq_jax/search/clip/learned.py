"""Clip ratios of both ends of each group by gradient descent (OmniQuant, arXiv 2308.13137, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from awq_jax.compat import adam
from awq_jax.kernels.arithmetic import dequantized
from awq_jax.search.clip.shrink import Clip, Ranges
from awq_jax.search.loss import group_blocks, group_error
from awq_jax.search.moments import Moments
from awq_jax.search.scale.gradient import straight_through
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import affine, group


@dataclass(frozen=True)
class LearnedClip:
    """The best ranges met on `iterations` of Adam, group by group, from what `start` finds.

    Args:
      rate: of the ratios.
    """

    start: Clip = field(default_factory=Clip)
    iterations: int = 50
    rate: float = 0.01

    def __call__(self, w: Float[Array, "i o"], moments: Moments, spec: QuantSpec) -> Ranges:
        low, high = self.start(w, moments, spec)
        grouped, gram = group(w, spec), group_blocks(moments, spec)

        def errors(ratios: Float[Array, "2 groups o"]) -> Float[Array, "groups o"]:
            steps, zeros = affine(low * ratios[0], high * ratios[1], spec)
            codes = straight_through(grouped / steps[:, None] + zeros[:, None], spec)
            return group_error(dequantized(codes, steps, zeros) - grouped, gram)

        optimizer = adam(self.rate)

        def step(state: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], None]:
            ratios, optimizer_state, best, least = state
            found, pull = jax.vjp(errors, ratios)
            (gradient,) = pull(jnp.ones_like(found))
            best, least = jnp.where(found < least, ratios, best), jnp.minimum(found, least)
            updates, optimizer_state = optimizer.update(gradient, optimizer_state)
            return (jnp.clip(ratios + updates, 0.3, 1.2), optimizer_state, best, least), None

        first = jnp.ones((2, *low.shape), low.dtype)
        state = (first, optimizer.init(first), first, jnp.full_like(low, jnp.inf))
        (_, _, best, _), _ = jax.lax.scan(step, state, length=self.iterations)
        return low * best[0], high * best[1]

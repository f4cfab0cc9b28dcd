"""Rounding learned by signed gradients (SignRound, arXiv 2309.05516), against the site's own output."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from awq_jax.kernels.arithmetic import dequantized
from awq_jax.search.loss import group_error
from awq_jax.search.moments import Moments
from awq_jax.search.rounding.feedback import Codes, in_rows, shrunk_blocks
from awq_jax.search.scale.gradient import straight_through
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import affine


@dataclass(frozen=True)
class Signed:
    """Offsets of at most half a step, moved by the sign of their gradient; the best codes met, column by column.

    The paper descends on a block's output, from activations; this one on the site's, from moments.

    Args:
      iterations: of descent; the rate falls from 1 / iterations to 0.
      shrink: how far the Gram matrix is shrunk towards its diagonal, as in Feedback.
    """

    iterations: int = 100
    shrink: float = 0.3

    def __call__(
        self,
        w: Float[Array, "i o"],
        low: Float[Array, "groups o"],
        high: Float[Array, "groups o"],
        moments: Moments,
        spec: QuantSpec,
    ) -> Codes:
        steps, zeros = affine(low, high, spec)
        gram = shrunk_blocks(moments, spec, self.shrink)
        rows, row_steps, row_zeros = in_rows(w, steps, zeros, gram, spec)
        levels = rows / row_steps + row_zeros

        def errors(offset: Float[Array, "n b o"]) -> tuple[Float[Array, " o"], Float[Array, "n b o"]]:
            codes = straight_through(levels + offset, spec)
            return group_error(dequantized(codes, row_steps, row_zeros) - rows, gram).sum(0), codes

        def step(state: tuple[Array, ...], k: Array) -> tuple[tuple[Array, ...], None]:
            offset, best, least = state
            found, pull, codes = jax.vjp(errors, offset, has_aux=True)
            (gradient,) = pull(jnp.ones_like(found))
            best, least = jnp.where(found < least, codes, best), jnp.minimum(found, least)
            rate = (1 - k / self.iterations) / self.iterations
            return (jnp.clip(offset - rate * jnp.sign(gradient), -0.5, 0.5), best, least), None

        first = jnp.zeros_like(levels)
        state = (first, jnp.round(jnp.clip(levels, 0, spec.levels)), jnp.full_like(w[0], jnp.inf))
        (_, codes, _), _ = jax.lax.scan(step, state, jnp.arange(self.iterations, dtype=w.dtype))
        return jnp.round(codes).reshape(-1, spec.group(len(w)), w.shape[1])[: len(steps)], steps, zeros

"""The paper's grid of scales, each candidate scored after rounding with error feedback.

Rounding to nearest likes larger scales than error feedback does, which mends by itself much of what scales are for.
An input scale s is the same as row steps finer by s, so all candidates share one Cholesky factor and are rounded side
by side, as columns of one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from awq_jax.kernels.arithmetic import dequantized
from awq_jax.search.loss import group_error
from awq_jax.search.moments import Moments
from awq_jax.search.rounding.feedback import in_blocks, rounded_rows, shrunk_blocks
from awq_jax.search.scale.grid import Grid, some_columns
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import affine, group_ranges


@dataclass(frozen=True)
class FeedbackGrid:
    """The candidate of `grid` with the least output error after `Feedback(shrink)`.

    Args:
      grid: gives the candidates, and how many columns of the weight vote.
      shrink: how far the Gram matrix is shrunk towards its diagonal, for rounding and for the error; as in Feedback.
    """

    grid: Grid = field(default_factory=lambda: Grid(tuple(i / 10 for i in range(8)), columns=64))
    shrink: float = 0.3

    def __call__(self, w: Float[Array, "i o"], moments: Moments, spec: QuantSpec) -> Float[Array, " i"]:
        w = some_columns(w, self.grid.columns)
        scales = self.grid.candidates(w, moments, spec)
        gram = shrunk_blocks(moments, spec, self.shrink)

        def row_steps(s: Float[Array, " i"]) -> tuple[Float[Array, "i o"], Float[Array, "i o"]]:
            steps, zeros = affine(*group_ranges(w * s[:, None], spec), spec)
            by_row = lambda a: jnp.repeat(a, spec.group(len(w)), 0)[: len(w)]
            return by_row(steps) / s[:, None], by_row(zeros)

        side_by_side = lambda a, fill: in_blocks(jnp.moveaxis(a, 0, 1).reshape(len(w), -1), gram, fill)
        steps, zeros = jax.vmap(row_steps)(scales)
        steps, zeros = side_by_side(steps, 1), side_by_side(zeros, 0)
        rows = side_by_side(jnp.broadcast_to(w, (len(scales), *w.shape)), 0)
        codes = rounded_rows(rows, steps, zeros, gram, spec, ordered=True)
        errors = group_error(dequantized(codes, steps, zeros) - rows, gram).sum(0)
        return scales[jnp.argmin(errors.reshape(len(scales), -1).sum(1))]

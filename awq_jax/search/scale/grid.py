"""Grid search over s = statistic ** r (AWQ, arXiv 2306.00978, section 3.2, eq. 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from awq_jax.search.loss import group_blocks, group_error
from awq_jax.search.moments import UNIT, Moments, unit
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import group, group_ranges, round_trip

SMALLEST = 1e-4
"""Of the statistic and of s before it is normalised, relative to their means; of statistics near 1, as in llm-awq."""


@dataclass(frozen=True)
class Grid:
    """s = x ** r / w ** p, x the size of the channel's inputs, w of its weights; the one with the least output error.

    Args:
      ratios: the exponents r that are tried.
      duo: p is 0 (the paper), 1 - r (AutoAWQ), both of them, or any of `ratios`. The identity is not among the
        candidates of "always"; `find_scale` tries it anyway.
      statistic: x is the mean of |x|, or the root of the mean of its square.
      columns: at most so many columns of the weight, evenly spread, vote on the ratio; 0 for all.
    """

    ratios: tuple[float, ...] = tuple(i / 20 for i in range(20))
    duo: Literal["never", "always", "both", "any"] = "never"
    statistic: Literal["mean", "rms"] = "mean"
    columns: int = 512

    def __call__(self, w: Float[Array, "i o"], moments: Moments, spec: QuantSpec) -> Float[Array, " i"]:
        w = some_columns(w, self.columns)
        scales = self.candidates(w, moments, spec)
        losses = jax.lax.map(lambda s: scale_error(w, s, moments, spec), scales)
        return scales[jnp.argmin(losses)]

    def candidates(self, w: Float[Array, "i o"], moments: Moments, spec: QuantSpec) -> Float[Array, "n i"]:
        """The scales that are tried, each normalised by sqrt(max s * min s)."""
        pairs = {
            "never": [(r, 0.0) for r in self.ratios],
            "always": [(r, 1 - r) for r in self.ratios],
            "both": [(r, p) for r in self.ratios for p in (0.0, 1 - r)],
            "any": [(r, p) for r in self.ratios for p in self.ratios],
        }[self.duo]
        r, p = jnp.array(pairs, jnp.float32).T[..., None]
        sized, relative = floored(sizes(moments, self.statistic)), relative_size(w, spec)
        return normalised(floored(sized[None] ** r / (relative[None] ** p + 1e-4)))


def floored(a: Float[Array, "*n i"]) -> Float[Array, "*n i"]:
    """Dead channels as if they had a ten-thousandth of the mean; ones where all are dead."""
    mean = a.mean(-1, keepdims=True)
    return jnp.maximum(a, jnp.where(mean > 0, SMALLEST * mean, 1))


def sizes(moments: Moments, statistic: Literal["mean", "rms"]) -> Float[Array, " i"]:
    """How large each input channel is."""
    if statistic == "mean":
        return moments.mean_abs
    return jnp.sqrt(moments.diagonal / UNIT**2 / jnp.maximum(moments.count, 1))


def normalised(s: Float[Array, "*n i"]) -> Float[Array, "*n i"]:
    """Scales whose largest times their smallest is 1 (llm-awq)."""
    s = s / unit(s, -1)
    return s / jnp.sqrt(s.max(-1, keepdims=True) * s.min(-1, keepdims=True))


def some_columns(w: Float[Array, "i o"], most: int) -> Float[Array, "i some"]:
    """At most so many columns, evenly spread; 0 for all."""
    return w[:, :: -(-w.shape[1] // most)] if 0 < most < w.shape[1] else w


def relative_size(w: Float[Array, "i o"], spec: QuantSpec) -> Float[Array, " i"]:
    """Mean over columns of |w| relative to the largest of its group (AutoAWQ's w_mean)."""
    grouped = jnp.abs(group(w, spec))
    largest = grouped.max(1, keepdims=True)
    return (grouped / jnp.where(largest > 0, largest, 1)).mean(-1).reshape(-1)[: w.shape[0]]


def scale_error(w: Float[Array, "i o"], s: Float[Array, " i"], moments: Moments, spec: QuantSpec) -> Float[Array, ""]:
    """The sum of `scale_errors`."""
    return scale_errors(w, s, moments, spec).sum()


def scale_errors(
    w: Float[Array, "i o"], s: Float[Array, " i"], moments: Moments, spec: QuantSpec
) -> Float[Array, " o"]:
    """The output error of each column when `w * s` is rounded to nearest and the input is divided by s.

    On the Gram matrix's blocks of one quantization group: for choosing s they are as good as all of it.
    """
    scaled = w * s[:, None]
    grouped = group(scaled, spec)
    rounded = round_trip(grouped, *group_ranges(scaled, spec), spec)
    inverse = group(1 / s[:, None], spec)
    return group_error((rounded - grouped) * inverse, group_blocks(moments, spec)).sum(0)

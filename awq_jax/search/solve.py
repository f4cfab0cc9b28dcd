"""From a matrix and the moments of its input to a quantized matrix: scale, clip, round."""

from __future__ import annotations

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from awq_jax.kernels.arithmetic import dequantized, ungrouped
from awq_jax.search.loss import output_error
from awq_jax.search.moments import Moments
from awq_jax.search.rounding.feedback import Codes, to_nearest
from awq_jax.search.scale.grid import scale_errors
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import group_ranges


class Solution(NamedTuple):
    """Codes (groups, g, o), steps and zeros (groups, o); mean squared output errors and energy of each column."""

    codes: Float[Array, "groups g o"]
    steps: Float[Array, "groups o"]
    zeros: Float[Array, "groups o"]
    error: Float[Array, " o"]
    nearest_error: Float[Array, " o"]
    energy: Float[Array, " o"]


@ft.partial(jax.jit, static_argnames=("n", "spec", "strategy"))
def find_scale(
    w: Float[Array, "i o"],
    moments: Moments,
    channels: Int[Array, " i"],
    *,
    n: int,
    spec: QuantSpec,
    strategy: Any,
) -> tuple[Float[Array, " n"], Float[Array, " i"], Float[Array, ""]]:
    """The strategy's scale, tied over input channels with the same number; its error beside.

    The statistic is pooled over tied channels before the search. Where the strategy's scale is no better than no
    scale, it is no scale: the identity is always a candidate. A `channels` of -1 is not scaled.

    Returns:
      one factor a number, the factor of each input channel, the output error (to be checked: it must be finite).
    """
    number = jnp.where(channels < 0, n, channels)
    seen = jnp.maximum(jax.ops.segment_sum(jnp.ones_like(moments.abs_sum), number, n + 1), 1)
    pooled = (jax.ops.segment_sum(moments.abs_sum, number, n + 1) / seen)[number]
    s = strategy(w, Moments(moments.count, pooled, moments.gram), spec)
    require_shape("the scale", s, w.shape[:1], "one for each input")
    factor = jnp.exp(jax.ops.segment_sum(jnp.log(s), number, n + 1) / seen).at[n].set(1.0)
    error = lambda s: by_columns(lambda w: scale_errors(w, s, moments, spec), w).sum()
    found, none = error(factor[number]), error(jnp.ones_like(s))
    factor = jnp.where(found < none, factor, jnp.ones_like(factor))
    return factor[:n], factor[number], jnp.where(found < none, found, none) + 0 * found


WORKING = 2**21
"""Weights that are searched at a time, about."""


def by_columns(f: Callable[[Float[Array, "i c"]], Any], w: Float[Array, "i o"]) -> Any:
    """`f(w)`, its last axis that of w's columns, from some columns after others.

    What `f` needs beside its result does not grow with the number of columns.
    """
    o = w.shape[1]
    n = -(-w.size // WORKING)
    if n < 2:
        return f(w)
    width = -(-o // n)
    padded = jnp.pad(w, ((0, 0), (0, n * width - o)))
    parts = jax.lax.map(lambda k: f(jax.lax.dynamic_slice_in_dim(padded, k * width, width, 1)), jnp.arange(n))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], n * width)[..., :o], parts)


def require_shape(what: str, found: Any, shape: tuple[int, ...], meaning: str) -> None:
    """Refuse what a strategy gave before it meets an operation that would not say whose it is."""
    if jnp.shape(found) != shape:
        raise ValueError(f"{what} that the strategy gave has shape {jnp.shape(found)}, expected {shape}: {meaning}.")


def rounding_error(
    w: Float[Array, "i o"],
    codes: Float[Array, "groups g o"],
    steps: Float[Array, "groups o"],
    zeros: Float[Array, "groups o"],
    moments: Moments,
) -> Float[Array, " o"]:
    """The mean squared output error of each column when these codes stand for `w`."""
    return output_error(ungrouped(dequantized(codes, steps, zeros), len(w)) - w, moments)


def rounded_to_nearest(w: Float[Array, "i o"], moments: Moments, spec: QuantSpec) -> tuple[Codes, Float[Array, " o"]]:
    """The codes of `w` rounded to nearest in its groups' whole ranges, and their `rounding_error`."""
    codes = to_nearest(w, *group_ranges(w, spec), moments, spec)
    return codes, rounding_error(w, *codes, moments=moments)


@ft.partial(jax.jit, static_argnames=("spec", "clip", "rounding"))
def solve(w: Float[Array, "i o"], moments: Moments, *, spec: QuantSpec, clip: Any, rounding: Any) -> Solution:
    """`w` clipped and rounded against the moments of its input; columns are independent of each other.

    A column whose error ends above that of rounding to nearest is rounded to nearest.
    """
    low, high = clip(w, moments, spec)
    for name, bounds in (("the clip's low", low), ("the clip's high", high)):
        require_shape(name, bounds, (-(-len(w) // spec.group(len(w))), w.shape[1]), "one for each group and output")
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    chosen = rounding(w, low, high, moments, spec)
    error = rounding_error(w, *chosen, moments=moments)
    plain, nearest_error = rounded_to_nearest(w, moments, spec)
    # Not where the error is no number: that must be seen.
    back = error > nearest_error
    codes, steps, zeros = (jnp.where(back, a, b) for a, b in zip(plain, chosen, strict=True))
    energy = output_error(w, moments)
    return Solution(codes, steps, zeros, jnp.where(back, nearest_error, error), nearest_error, energy)

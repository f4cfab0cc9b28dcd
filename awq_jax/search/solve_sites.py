"""The search on params as they are: sites that share an input become one matrix, layers and experts a loop.

Everything here is one program a shape, so the layers of a model share theirs however they are stored. Strategies see
weights and Gram matrices divided by a power of two near their largest, which rounds nothing: what they find depends on
no unit, and products of what is small are not zero.
"""

from __future__ import annotations

import functools as ft
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from awq_jax.kernels.arithmetic import dequantized
from awq_jax.search.moments import UNIT, Moments, unit
from awq_jax.search.solve import Solution, find_scale, rounded_to_nearest, rounding_error, solve
from awq_jax.weights.layout import Layout
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import QuantizedTensor, assemble, group, half_step, nearest


@ft.partial(jax.jit, static_argnames=("layouts", "n", "spec", "strategy"))
def scale_of_fold(
    leaves: tuple[Array, ...],
    moments: tuple[Moments, ...],
    channels: Int[Array, " i"],
    *,
    layouts: tuple[Layout, ...],
    n: int,
    spec: QuantSpec,
    strategy: Any,
) -> tuple[Float[Array, "*stack n"], Float[Array, "*stack"]]:
    """The factors of a fold, and the output error with them (to be checked: it must be finite).

    Experts share theirs: what any of them reads counts for all, and together they vote with as many columns as one has.

    Args:
      leaves: the params of its sites, and beside them `layouts`.
      moments: of the sites' inputs, one for each tensor that is read.
      channels: the number of each input channel's factor.
      n: how many factors.
    """
    matrices = (layout.apply(leaf) for leaf, layout in zip(leaves, layouts, strict=True))
    voters = [some_of_experts(w, layout.n_lead) for w, layout in zip(matrices, layouts, strict=True)]
    w = jnp.concatenate([jnp.asarray(w, jnp.float32) for w in voters], -1)
    of_all = [of_all_experts(m, m.count.ndim - (w.ndim - 2)) for m in moments]
    w, pooled = w / unit(w), in_units(ft.reduce(Moments.__add__, of_all))
    search = lambda w, m: find_scale(w, m, channels, n=n, spec=spec, strategy=strategy)
    factors, _, error = looped(search, w.ndim - 2, w, pooled)
    return factors, error


@ft.partial(jax.jit, static_argnames=("layouts", "spec", "scale", "clip", "rounding", "half"))
def solve_sites(
    leaves: tuple[Array, ...],
    moments: Moments,
    folded: Float[Array, "*stack i"] | None,
    *,
    layouts: tuple[Layout, ...],
    spec: QuantSpec,
    scale: Any,
    clip: Any,
    rounding: Any,
    half: bool = False,
) -> tuple[tuple[QuantizedTensor, ...], Float[Array, "sites 5"]]:
    """Scale, clip and round the params of sites that read the same input.

    Where their error with a scale of their own ends above that of rounding to nearest, they are rounded to nearest.

    Args:
      leaves: params, and beside them `layouts`.
      moments: of the input, before any scale.
      folded: the scale that is in the params already, the same for all experts; None for none.
      scale, clip, rounding: strategies; scale is None where the sites get no input scale.
      half: only where scale is None: steps are what float16 holds, subnormal numbers included.

    Returns:
      the quantized params, their steps float32; for each the error, that of rounding to nearest without any scale, its
      output's energy, all three in a unit of their own, and its smallest and largest step.
    """
    w = side_by_side(leaves, layouts)
    lead, size, n_lead = w.shape[:-2], unit(w), layouts[0].n_lead
    w, moments = w / size, in_units(lent_by_others(moments, n_lead))
    if folded is not None:
        by_expert = jnp.expand_dims(folded, tuple(range(len(lead) - n_lead, len(lead))))
        folded = jnp.broadcast_to(by_expert, (*lead, w.shape[-2]))

    def one(w: Float[Array, "i o"], moments: Moments, folded: Float[Array, " i"] | None) -> Any:
        dense = w if folded is None else w / folded[:, None]
        plain, nearest = rounded_to_nearest(dense, moments, spec)
        if folded is not None:
            moments = moments.scaled(1 / folded)
        if scale is None:
            found = solve(w, moments, spec=spec, clip=clip, rounding=rounding)._replace(nearest_error=nearest)
            return with_half_steps(found, w, size, moments, spec) if half else found, None
        _, s, error = find_scale(w, moments, jnp.arange(len(w)), n=len(w), spec=spec, strategy=scale)
        found = solve(w * s[:, None], moments.scaled(1 / s), spec=spec, clip=clip, rounding=rounding)
        # A strategy that found no scale shows only in its own error: there was no scale to round with.
        found = found._replace(error=found.error + 0 * error, nearest_error=nearest)
        back = found.error.sum() > nearest.sum()
        unscaled = found._replace(codes=plain[0], steps=plain[1], zeros=plain[2], error=nearest)
        return jax.tree.map(ft.partial(jnp.where, back), (unscaled, jnp.ones_like(s)), (found, s))

    found, s = looped(one, len(lead), w, moments, folded)
    steps = found.steps * size
    widths = [layout.apply(leaf).shape[-1] for leaf, layout in zip(leaves, layouts, strict=True)]
    tensors, errors = [], []
    for leaf, layout, end, width in zip(leaves, layouts, accumulate(widths), widths, strict=True):
        part = slice(end - width, end)
        tensor = assemble(
            found.codes[..., part],
            steps[..., part],
            found.zeros[..., part],
            spec,
            in_features=w.shape[-2],
            dtype=leaf.dtype,
            input_scale=None if s is None else 1 / s,
            layout=None if layout.is_matrix else layout,
        )
        tensors.append(tensor)
        sums = (e[..., part].sum() for e in (found.error, found.nearest_error, found.energy))
        errors.append(jnp.stack([*sums, steps[..., part].min(), steps[..., part].max()]))
    return tuple(tensors), jnp.stack(errors)


def with_half_steps(
    found: Solution, w: Float[Array, "i o"], size: Float[Array, ""], moments: Moments, spec: QuantSpec
) -> Solution:
    """What was found for `w * size`, with steps that float16 holds.

    Codes are those nearest to what was found, which keeps what error feedback did; or to the weights, in columns where
    a step moves and that is better.
    """
    steps = half_step(found.steps * size) / size
    rounded = dequantized(found.codes, found.steps, found.zeros)
    choices = [nearest(a, steps, found.zeros, spec) for a in (rounded, group(w, spec))]
    kept, plain = (rounding_error(w, codes, steps, found.zeros, moments) for codes in choices)
    better = (steps != found.steps).any(0) & (plain < kept)
    codes, error = (jnp.where(better, b, a) for a, b in (choices, (kept, plain)))
    return found._replace(codes=codes, steps=steps, error=error)


def in_units(moments: Moments) -> Moments:
    """`moments` of inputs whose largest mean, and that of their squares, is near 1."""
    mean = moments.gram / jnp.maximum(moments.count, 1)[..., None, None, None]
    abs_sum = moments.abs_sum / unit(moments.mean_abs)
    return replace(moments, abs_sum=abs_sum, gram=moments.gram / unit(mean) * UNIT**2)


def side_by_side(leaves: tuple[Array, ...], layouts: tuple[Layout, ...]) -> Float[Array, "*lead i o"]:
    """Params as one matrix a layer and expert, float32."""
    matrices = [layout.apply(jnp.asarray(leaf, jnp.float32)) for leaf, layout in zip(leaves, layouts, strict=True)]
    return jnp.concatenate(matrices, -1)


def some_of_experts(w: Float[Array, "*lead i o"], n_lead: int) -> Float[Array, "*stack i some"]:
    """Columns of all experts side by side, of each so few that all are about as many as one expert has."""
    depth = w.ndim - 2 - n_lead
    some = jnp.moveaxis(w[..., :: math.prod(w.shape[depth:-2])], -2, depth)
    return some.reshape(*some.shape[: depth + 1], -1)


def of_all_experts(moments: Moments, n_lead: int, *, keepdims: bool = False) -> Moments:
    """The moments of what any expert of a layer read; the last `n_lead` axes of the count are experts'."""
    experts = tuple(range(moments.count.ndim - n_lead, moments.count.ndim))
    return jax.tree.map(lambda a: a.sum(experts, keepdims=keepdims), moments)


def lent_by_others(moments: Moments, n_lead: int) -> Moments:
    """An expert that no token reached, or none but zeros, gets the moments of all experts of its layer."""
    if n_lead == 0:
        return moments
    unreached = ~moments.reached
    lent = lambda a, of_all: jnp.where(unreached.reshape(unreached.shape + (1,) * (a.ndim - unreached.ndim)), of_all, a)
    return jax.tree.map(lent, moments, of_all_experts(moments, n_lead, keepdims=True))


def looped(f: Callable[..., Any], lead: int, *args: Any) -> Any:
    """`f` over the first `lead` axes of all arrays in `args`, compiled for one element."""
    if lead == 0:
        return f(*args)
    shape = jax.tree.leaves(args)[0].shape[:lead]
    flat = jax.tree.map(lambda a: a.reshape(math.prod(shape), *a.shape[lead:]), args)
    out = jax.lax.map(lambda a: f(*a), flat)
    return jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), out)

"""Bits by site for a budget: sites whose error falls most per bit get more of them.

The divergence of a model's output adds up over its sites, nearly, and rises with each site's relative output error. So
this is a knapsack: each group of sites that share an input takes one of a few widths. Upgrades are bought in the order
of error saved per bit, which is the optimum up to the last purchase where errors are convex in the bits.
"""

from __future__ import annotations

import functools as ft
import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from awq_jax.moments import Moments
from awq_jax.quantize import plan
from awq_jax.recipe import Recipe
from awq_jax.search.loss import group_blocks, group_error
from awq_jax.search.params import lent_by_others, looped, side_by_side
from awq_jax.sites import named_leaves
from awq_jax.spec import QuantSpec, Rule
from awq_jax.tensor import Layout, group, group_ranges, round_trip
from awq_jax.transform import Calibration

CHOICES = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Offer:
    """What a group of sites costs at each width.

    Args:
      sites: their names.
      weights: how many weights they have.
      errors: for each of CHOICES the sites' relative output errors, summed, when rounded to nearest.
    """

    sites: tuple[str, ...]
    weights: int
    errors: tuple[float, ...]


def offers(params: Any, calibration: Calibration, recipe: Recipe, prefix: str = "") -> list[Offer]:
    """An offer for each group of sites that the recipe quantizes and gives no bits by a rule."""
    leaves, sites = named_leaves(params), calibration.traced.sites
    groups: dict[Any, list[str]] = {}
    for name, spec in plan(calibration, recipe, prefix).specs.items():
        rule = recipe.rule_of(prefix + name)
        if rule is None or rule.bits is None:
            groups.setdefault((sites[name].group, spec), []).append(name)
    out = []
    for (_, spec), names in groups.items():
        found = nearest_errors(
            tuple(leaves[name] for name in names),
            calibration.of(names[0]),
            layouts=tuple(sites[name].layout for name in names),
            specs=tuple(replace(spec, bits=bits) for bits in CHOICES),
        )
        weights = sum(int(np.size(leaves[name])) for name in names)
        out.append(Offer(tuple(prefix + n for n in names), weights, tuple(map(float, found))))
    return out


@ft.partial(jax.jit, static_argnames=("layouts", "specs"))
def nearest_errors(
    leaves: tuple[Array, ...], moments: Moments, *, layouts: tuple[Layout, ...], specs: tuple[QuantSpec, ...]
) -> Float[Array, " specs"]:
    """Errors of rounding to nearest, relative to the output's energy, summed over layers, experts and params."""
    w = side_by_side(leaves, layouts)
    moments = lent_by_others(moments, layouts[0].n_lead)
    widths = np.cumsum([layout.matrix(leaf).shape[-1] for leaf, layout in zip(leaves, layouts, strict=True)])

    def one(w: Float[Array, "i o"], moments: Moments) -> Float[Array, " specs"]:
        gram = group_blocks(moments, specs[0])
        grouped, ranges = group(w, specs[0]), group_ranges(w, specs[0])
        parts = lambda columns: jnp.stack([part.sum() for part in jnp.split(columns, widths[:-1])])
        energy = jnp.maximum(parts(group_error(grouped, gram).sum(0)), 1e-30)
        errors = [parts(group_error(round_trip(grouped, *ranges, s) - grouped, gram).sum(0)) for s in specs]
        return jnp.stack([(e / energy).sum() for e in errors])

    return looped(one, w.ndim - 2, w, moments).reshape(-1, len(specs)).sum(0)


def allocate(offered: Sequence[Offer], average: float) -> dict[str, int]:
    """Bits for each site so that the weights of all take at most `average` bits in the mean.

    Raises:
      ValueError: an average that no choice of widths has.
    """
    if not CHOICES[0] <= average <= CHOICES[-1]:
        raise ValueError(f"{average} bits on average: give {CHOICES[0]} to {CHOICES[-1]}.")
    left = (average - CHOICES[0]) * sum(o.weights for o in offered) + 1e-6
    level = [0] * len(offered)
    queue = [step for k, o in enumerate(offered) if (step := _best_step(o, 0, left, k))]
    heapq.heapify(queue)
    while queue:
        _, k, to = heapq.heappop(queue)
        cost = _cost(offered[k], level[k], to)
        if cost <= left:
            left -= cost
            level[k] = to
        if step := _best_step(offered[k], level[k], left, k):
            heapq.heappush(queue, step)
    return {name: CHOICES[level[k]] for k, o in enumerate(offered) for name in o.sites}


def _cost(offer: Offer, at: int, to: int) -> float:
    return (CHOICES[to] - CHOICES[at]) * offer.weights


def _best_step(offer: Offer, at: int, left: float, k: int) -> tuple[float, int, int] | None:
    """(minus the error saved per bit, the offer's number, the new level) of the affordable upgrade that pays most."""
    gain = lambda to: (offer.errors[at] - offer.errors[to]) / _cost(offer, at, to)
    affordable = [to for to in range(at + 1, len(CHOICES)) if _cost(offer, at, to) <= left]
    return min(((-gain(to), k, to) for to in affordable), default=None)


def with_bits(recipe: Recipe, bits: Mapping[str, int]) -> Recipe:
    """`recipe` with a rule for each site, that keeps what the recipe's own rules change besides."""

    def rule(name: str, b: int) -> Rule:
        pattern, own = f"^{re.escape(name)}$", recipe.rule_of(name)
        return Rule(pattern, bits=b) if own is None else replace(own, pattern=pattern, bits=b)

    new = tuple(rule(name, b) for name, b in bits.items())
    patterns = {r.pattern for r in new}
    return replace(recipe, rules=(*(r for r in recipe.rules if r.pattern not in patterns), *new))


def with_average_bits(params: Any, calibration: Calibration, average: float, recipe: Recipe | None = None) -> Recipe:
    """`recipe` with the bits of every site chosen so that their weights take `average` bits in the mean.

    Sites whose bits a rule of the recipe fixes are not among them. Steps and zero points come on top.

    Args:
      params, calibration: as for `quantize`.
      average: 2 to 8; need not be whole.

    Raises:
      ValueError: an average out of range.

    Example:
      >>> recipe = awq.with_average_bits(params, calibration, 3.5, awq.Recipe(group_size=64))
      >>> qparams, report = awq.quantize(params, calibration, recipe)
    """
    recipe = recipe or Recipe()
    return with_bits(recipe, allocate(offers(params, calibration, recipe), average))

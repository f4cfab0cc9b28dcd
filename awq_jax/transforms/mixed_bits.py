"""Bits by site for a budget: groups of sites whose rounding changes the function most per bit get more of them.

The divergence of a model's output adds up over its sites, nearly. So this is a knapsack: each group of sites that share
an input takes one of a few widths. What a group costs is measured, with nothing but that group quantized. On SmolLM2,
with 120 groups in 3 bits, the relative change of the logits tells a group's divergence within a factor of 1.2, that of
its own block's output within 1.7, and the sites' own relative output errors within 2.5: what is large beside a site's
output need not be so beside the residual it is added to.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from awq_jax.errors import InputError
from awq_jax.search.moments import unit
from awq_jax.transforms.calibrate import Calibration
from awq_jax.transforms.quantize import check_params, plan, quantize
from awq_jax.transforms.recipe import Recipe
from awq_jax.weights.paths import named_leaves
from awq_jax.weights.spec import Rule

CHOICES = (2, 3, 4, 5, 6, 8)
MEASURED = 3
"""The width at which a group is measured. A step has 2^bits - 1 to a range, and the error goes with its square."""


@dataclass(frozen=True)
class Group:
    """Sites that share an input and a spec, by name, and how many weights they have."""

    sites: tuple[str, ...]
    weights: int


@dataclass(frozen=True)
class Offer:
    """What a group of sites costs at each of CHOICES, in any unit that adds up over groups."""

    group: Group
    errors: tuple[float, ...]

    @classmethod
    def of(cls, group: Group, error: Float[Array, ""] | float) -> Offer:
        """`error` is that at MEASURED bits."""
        return cls(group, tuple(float(error) * ((2**MEASURED - 1) / (2**bits - 1)) ** 2 for bits in CHOICES))


def quantized_alone(
    params: Any, calibration: Calibration, recipe: Recipe, prefix: str = ""
) -> Iterator[tuple[Group, Any]]:
    """Each group of sites that the recipe gives no bits by a rule, and params with only it quantized, to MEASURED bits.

    The params are dense again: `calibration.fn` takes them, compiled once.
    """
    leaves, sites = named_leaves(params), calibration.traced.sites
    groups: dict[Any, list[str]] = {}
    for name, spec in plan(calibration, recipe, prefix).specs.items():
        rule = recipe.rule_of(prefix + name)
        if rule is None or rule.bits is None:
            groups.setdefault((sites[name].group, spec), []).append(name)
    widths = {prefix + name: MEASURED for names in groups.values() for name in names}
    # Of a fold's sites the others are dense: what it would do for one is done beside it.
    unfolded = replace(recipe, scales="none" if recipe.scales == "none" else "beside")
    small = named_leaves(quantize(params, calibration, with_bits(unfolded, widths), prefix=prefix)[0])
    for names in groups.values():
        changed = leaves | {name: small[name].dequantize() for name in names}
        weights = sum(int(np.size(leaves[name])) for name in names)
        group = Group(tuple(prefix + name for name in names), weights)
        yield group, jax.tree.unflatten(jax.tree.structure(params), changed.values())


@jax.jit
def relative_error(changed: Any, outputs: Any) -> Float[Array, ""]:
    """The squared error of each vector of the outputs (last axis) relative to its energy, in the mean."""

    def errors(y: Array, exact: Array) -> Float[Array, " vectors"]:
        y, exact = (jnp.atleast_1d(jnp.asarray(a, jnp.float32)) for a in (y, exact))
        size = unit(exact, -1)
        y, exact = y / size, exact / size
        energy = jnp.square(exact).sum(-1)
        return jnp.where(energy > 0, jnp.square(y - exact).sum(-1) / energy, 0).ravel()

    pairs = zip(jax.tree.leaves(changed), jax.tree.leaves(outputs), strict=True)
    found = [errors(y, exact) for y, exact in pairs if jnp.issubdtype(exact.dtype, jnp.inexact)]
    if not found:
        raise ValueError("The function returns integers alone: let it return logits, whose error can be measured.")
    return jnp.concatenate(found).mean()


def check_average(average: float) -> None:
    """Refuse an average that no choice of widths has."""
    if not CHOICES[0] <= average <= CHOICES[-1]:
        raise InputError(f"{average} bits on average: give {CHOICES[0]} to {CHOICES[-1]}.")


def allocate(offered: Sequence[Offer], average: float) -> dict[str, int]:
    """Bits for each site so that the weights of all take at most `average` bits in the mean.

    Raises:
      ValueError: an average that no choice of widths has.
    """
    check_average(average)
    left = (average - CHOICES[0]) * sum(o.group.weights for o in offered) + 1e-6
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
    return {name: CHOICES[level[k]] for k, o in enumerate(offered) for name in o.group.sites}


def _cost(offer: Offer, at: int, to: int) -> float:
    return (CHOICES[to] - CHOICES[at]) * offer.group.weights


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

    Sites whose bits a rule of the recipe fixes are not among them. Steps and zero points come on top. Every group of
    sites that share an input is quantized to 3 bits, alone, and `calibration`'s function runs on its first batch: what
    its output changes decides.

    Args:
      params, calibration: as for `quantize`.
      average: 2 to 8; need not be whole.

    Raises:
      ValueError: an average out of range; outputs that are integers; what `quantize` raises.

    Example:
      >>> recipe = awq.with_average_bits(params, calibration, 3.5, awq.Recipe(group_size=64))
      >>> qparams, report = awq.quantize(params, calibration, recipe)
    """
    recipe = recipe or Recipe()
    check_average(average)
    check_params(params, calibration)
    run = jax.jit(calibration.fn)
    exact = run(params, *calibration.example)
    relative_error(exact, exact)  # refuses outputs that it cannot measure before the search
    offered = [
        Offer.of(group, relative_error(run(changed, *calibration.example), exact))
        for group, changed in quantized_alone(params, calibration, recipe)
    ]
    return with_bits(recipe, allocate(offered, average))

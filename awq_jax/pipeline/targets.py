"""A target in the terms of a recipe: format, symmetry and group size that its fast path reads, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from awq_jax.errors import InputError
from awq_jax.formats.servers import TARGETS, Target
from awq_jax.near import did_you_mean
from awq_jax.transforms.recipe import Recipe
from awq_jax.weights.spec import QuantSpec


def target_of(name: str) -> Target:
    """The target of a name.

    Raises:
      InputError: there is none.
    """
    if name not in TARGETS:
        raise InputError(f"target={name!r}: choose one of {', '.join(TARGETS)}{did_you_mean(name, TARGETS)}.")
    return TARGETS[name]


def for_target(
    name: str, recipe: Recipe, *, format: str | None = None, average_bits: float | None = None
) -> tuple[str, Recipe, str]:
    """(format, recipe with its symmetry and, where there is one only, its group size, a line that says why).

    Args:
      format: what is asked for beside the target.
      average_bits: the same of the mean of several widths.

    Raises:
      InputError: the target does not read so many bits, or groups of such a size, or reads another format.
    """
    target = target_of(name)
    if (bits := average_bits or recipe.bits) not in target.formats:
        known = ", ".join(map(str, target.formats))
        raise InputError(f"bits={bits}: target={name!r} reads {known} bits fast. {target.why}.")
    if recipe.group_size is not None and recipe.group_size not in target.groups:
        known = ", ".join(map(str, target.groups))
        raise InputError(f"group_size={recipe.group_size}: target={name!r} reads groups of {known} fast. {target.why}.")
    symmetric, group = target.symmetric.get(recipe.bits), recipe.group_size
    if len(target.groups) == 1:
        group = target.groups[0]
    recipe = replace(recipe, symmetric=recipe.symmetric or bool(symmetric), group_size=group)
    best = target.formats[recipe.bits]
    if format not in (None, best):
        raise InputError(
            f"format={format!r}: target={name!r} takes format={best!r}: leave one of them out. {target.why}."
        )
    zeros = ", symmetric" if recipe.symmetric else ""
    return best, recipe, f"For {name}: format {best}, {recipe.bits} bits{zeros}. {target.why}."


def kernels(
    target: Target,
    format: str,
    weights: Mapping[str, tuple[tuple[int, ...], QuantSpec]],
    wholes: Sequence[Sequence[str]],
) -> dict[str, str]:
    """What a target runs each weight on, by its name.

    Args:
      weights: (..., i, o) and spec of each.
      wholes: names of those of which servers make one matrix.
    """
    joined = {name: [part for part in whole if part in weights] for whole in wholes for name in whole}
    found = {}
    for name, (shape, spec) in weights.items():
        outputs = sum(weights[part][0][-1] for part in joined.get(name, [name]))
        found[name] = target.kernel(format, spec, shape[-2], outputs)
    return found

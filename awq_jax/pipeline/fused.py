"""Matrices of which servers make one: an AutoAWQ file has all of such a group quantized, or none.

vLLM refuses others ("some but not all shards"), and SGLang asks for the name of the whole among those left dense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from awq_jax.transforms.quantize import SiteReport
from awq_jax.transforms.recipe import Recipe, some
from awq_jax.weights.spec import Rule

Fused = Mapping[str, Sequence[str]]
"""The Hugging Face name of each whole -> the paths of its parts, as awq_jax.models have it."""


def skip_whole(recipe: Recipe, fused: Fused) -> tuple[Recipe, tuple[SiteReport, ...]]:
    """`recipe` that skips all parts of a whole where it skips one, and what to report of those it now skips too."""
    notes = {}
    for parts in fused.values():
        if skipped := [name for name in parts if recipe.spec_of(name) is None]:
            why = f"left dense with {skipped[0]}, as servers make one matrix of them"
            notes |= dict.fromkeys((name for name in parts if name not in skipped), why)
    if not notes:
        return recipe, ()
    rule = Rule(f"^({'|'.join(map(re.escape, notes))})$", skip=True)
    reports = tuple(SiteReport(name, None, 0.0, 0.0, why) for name, why in notes.items())
    return replace(recipe, rules=(*recipe.rules, rule)), reports


def left_whole(recipe: Recipe, fused: Fused) -> list[str]:
    """The wholes of which `recipe` skips every part."""
    return [whole for whole, parts in fused.items() if all(recipe.spec_of(name) is None for name in parts)]


def widening(reports: Sequence[SiteReport]) -> tuple[str, ...]:
    """What to tell of the sites that `skip_whole` added."""
    names = [site.name for site in reports]
    why = "matrices stay dense beside those that were skipped, as servers make one matrix of them"
    return (f"{len(names)} more {why}: {some(names)}.",) if names else ()

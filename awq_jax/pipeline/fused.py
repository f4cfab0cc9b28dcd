"""Matrices of which servers make one: an AutoAWQ file has all of such a group quantized, or none.

vLLM refuses others ("some but not all shards"), and SGLang asks for the name of the whole among those left dense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os.path import commonpath

from awq_jax.models.family import HF, SERVED
from awq_jax.transforms.quantize import SiteReport
from awq_jax.transforms.recipe import Recipe, some
from awq_jax.weights.spec import Rule

Fused = Mapping[str, Sequence[str]]
"""The Hugging Face name of each whole -> the paths of its parts, as awq_jax.models have it."""
WHOLES = {
    name.rpartition(".")[2]: whole
    for path, name in HF.items()
    for whole, parts in SERVED.items()
    if path.rpartition("/")[2] in parts
}
"""What most models call a part, "q_proj" -> what servers call the whole, "qkv_proj"."""


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


def fused_by_name(files: Mapping[str, Sequence[str]]) -> Fused:
    """Those of a model of transformers of which names are all that is known.

    Args:
      files: for each site, by torch's name, the tensors that files hold of it.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for name in files:
        outer, _, module = name.removesuffix(".weight").rpartition(".")
        whole = "" if outer.endswith(".experts") else WHOLES.get(module)
        if whole is not None:
            found.setdefault((outer, whole), []).append(name)
    within = lambda parts: commonpath([t.replace(".", "/") for part in parts for t in files[part]]).replace("/", ".")
    join = lambda outer, whole: f"{outer}.{whole}" if whole else outer
    return {join(within(parts), whole): parts for (_, whole), parts in found.items() if len(parts) > 1}


def left_whole(recipe: Recipe, fused: Fused) -> list[str]:
    """The wholes of which `recipe` skips every part."""
    return [whole for whole, parts in fused.items() if all(recipe.spec_of(name) is None for name in parts)]


def widening(reports: Sequence[SiteReport]) -> tuple[str, ...]:
    """What to tell of the sites that `skip_whole` added."""
    names = [site.name for site in reports]
    why = "matrices stay dense beside those that were skipped, as servers make one matrix of them"
    return (f"{len(names)} more {why}: {some(names)}.",) if names else ()

"""Recipe: which sites, how many bits, and which strategies choose the numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from awq_jax.near import did_you_mean
from awq_jax.search import Clip, Feedback, FeedbackGrid, no_clip
from awq_jax.search.moments import GRAM_BLOCK
from awq_jax.weights.spec import QuantSpec, Rule

GROUPS = (128, 64, 32)
"""Group sizes to choose from, the cheapest first."""
Scales = Literal["beside", "folded", "both", "none"]


@dataclass(frozen=True)
class Recipe:
    """How to quantize a model.

    Args:
      bits, group_size, symmetric: of every site that no rule changes; see QuantSpec. A group size of None is, for a
        model on disk, the largest of 128, 64 and 32 that divides the inputs of all these sites; in memory it is 128.
      rules: by path of the param; the last one that matches counts.
      scales: of input channels. "beside": each site keeps its own beside its weight. "folded": they are put into the op
        before, where tracing finds one that can take them, and other sites have none, as AutoAWQ files need. "both":
        folded where that can be, else beside. "none".
      gram_block: largest size of the diagonal blocks of the Gram matrices that streaming keeps; None for all.
      samples: calibration sequences that `quantize_checkpoint` takes unless it is told a number.
      unclipped: regular expression; groups of matching sites keep their whole range.
      scale, clip, rounding: the strategies, see awq_jax.search. Any function of the same signature will do.

    Raises:
      ValueError: a value outside its range; two rules that say different things of one pattern.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = False
    rules: tuple[Rule, ...] = ()
    scales: Scales = "beside"
    gram_block: int | None = GRAM_BLOCK
    samples: int = 32
    unclipped: str = ""
    scale: Callable[..., Any] = field(default_factory=FeedbackGrid)
    clip: Callable[..., Any] = field(default_factory=Clip)
    rounding: Callable[..., Any] = field(default_factory=Feedback)

    def __post_init__(self) -> None:
        _ = self.spec
        if self.scales not in (known := get_args(Scales)):
            raise ValueError(
                f"scales={self.scales!r}: choose one of {', '.join(known)}{did_you_mean(str(self.scales), known)}."
            )
        if self.gram_block is not None and self.gram_block < 1:
            raise ValueError(f"gram_block={self.gram_block}: give 1 or more, or None for whole Gram matrices.")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: give 1 calibration sequence or more.")
        try:
            re.compile(self.unclipped)
        except re.error as e:
            raise ValueError(f"unclipped={self.unclipped!r} is not a regular expression: {e}") from e
        if isinstance(self.rules, Rule):
            raise ValueError(f"rules={self.rules}: give a tuple of rules, ({self.rules},).")
        if odd := [rule for rule in self.rules if not isinstance(rule, Rule)]:
            raise ValueError(f"rules has {odd[0]!r}: give awq.Rule({odd[0]!r}, skip=True), say.")
        for k, rule in enumerate(self.rules):
            if any(rule.pattern == other.pattern and rule != other for other in self.rules[:k]):
                raise ValueError(f"two rules contradict each other on {rule.pattern!r}: keep one.")
        for name in ("scale", "clip", "rounding"):
            strategy = getattr(self, name)
            if not callable(strategy) or not isinstance(strategy, Hashable):
                raise ValueError(f"Recipe.{name}={strategy!r} is not a hashable function; see awq_jax.search.")

    @property
    def spec(self) -> QuantSpec:
        """Of a site that no rule changes."""
        return QuantSpec(self.bits, GROUPS[0] if self.group_size is None else self.group_size, self.symmetric)

    @property
    def folds(self) -> bool:
        """Whether scales go into the op before, where they can."""
        return self.scales in ("folded", "both")

    @property
    def beside(self) -> bool:
        """Whether a site whose scale is not folded keeps it beside its weight."""
        return self.scales in ("beside", "both")

    def clip_of(self, name: str) -> Callable[..., Any]:
        """The clip strategy of the param at path `name`."""
        return no_clip if self.unclipped and re.search(self.unclipped, name) else self.clip

    def spec_of(self, name: str) -> QuantSpec | None:
        """The spec of the param at path `name`, None where it stays dense."""
        last = self.rule_of(name)
        if last is None:
            return self.spec
        return None if last.skip else replace(self.spec, **last.changes)

    def check_rules(self, names: Iterable[str], others: Mapping[str, str] | None = None) -> None:
        """Refuse a rule that matches none of a model's sites; `others` tells why a param is none."""
        names = list(names)
        for rule in self.rules:
            if not any(re.search(rule.pattern, name) for name in names):
                found = [f"{name} ({why})" for name, why in (others or {}).items() if re.search(rule.pattern, name)]
                no_site = f" It matches {some(found)}, which cannot be quantized." if found else ""
                raise ValueError(
                    f"rule {rule.pattern!r} matches none of the {len(names)} sites: {some(names)}.{no_site} Rules "
                    "are regular expressions, searched anywhere in these names."
                )

    def rule_of(self, *names: str) -> Rule | None:
        """The last rule that matches the param at a path, or at one of the paths by which it is known."""
        matches = lambda rule: any(re.search(rule.pattern, name) for name in names)
        return next(filter(matches, reversed(self.rules)), None)


def some(names: list[str]) -> str:
    """The first four of them."""
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")

"""The gate: what a checkpoint may differ from its base at most, and the prompts to blame where it does more."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from awq_jax.errors import InputError
from awq_jax.near import did_you_mean
from awq_jax.records.comparison import Comparison, Run, Side

NAMED = 5
"""Prompts that one line names."""


class Limit(NamedTuple):
    """What is held against a limit: of a checkpoint, of one run of it; what is within; how it is written; the largest
    one that says anything."""

    of: Callable[[Side], float | None]
    of_run: Callable[[Run], float | None]
    within: Callable[[float, float], bool]
    what: str
    form: str
    most: float = math.inf


LIMITS = {
    "kl": Limit(lambda side: side.kl, lambda run: run.kl, operator.le, "KL to the base, at most", ".4g"),
    "top1": Limit(
        lambda side: side.top1, lambda run: run.top1, operator.ge, "same likeliest token, at least", ".4g", 1
    ),
    "ppl": Limit(lambda side: side.ppl, lambda run: run.ppl, operator.le, "perplexity over the base's, at most", ".4g"),
    "checks": Limit(
        lambda side: side.checks,
        lambda run: float(bool(run.lost)) if run.answer else None,
        operator.le,
        "answers that fail a check the base passes, at most",
        ".0f",
    ),
}


@dataclass(frozen=True)
class Verdict:
    """Whether a checkpoint is within one limit, and if not the runs that are beyond it, the worst first."""

    checkpoint: str
    digest: str
    limit: str
    allowed: float
    found: float | None
    passed: bool
    offending: tuple[Run, ...] = ()

    @property
    def told(self) -> str:
        """What was found and what is allowed."""
        rule = LIMITS[self.limit]
        found = "not known" if self.found is None else format(self.found, rule.form)
        return f"{self.limit} is {found} ({rule.what} {self.allowed:g})"

    @property
    def names(self) -> list[str]:
        """Of the offending prompts."""
        return list(dict.fromkeys(run.prompt.name for run in self.offending))

    def __str__(self) -> str:
        line, names = f"{self.checkpoint}: {self.told}", self.names
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return f"{line}: {', '.join(names[:NAMED])}{more}" if names else line


def parse_gate(text: str) -> dict[str, float]:
    """The limits that "kl=0.05,top1=0.97" says.

    Raises:
      InputError: a limit that there is not, or twice; no number, or one that is out of range.
    """
    found = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, value = map(str.strip, part.partition("="))
        if name not in LIMITS:
            raise InputError(
                f"gate={text!r}: there is no limit {name!r}{did_you_mean(name, LIMITS)}: give {', '.join(LIMITS)}."
            )
        if name in found:
            raise InputError(f"gate={text!r}: {name} is given twice: give it once.")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = math.nan
        if not math.isfinite(found[name]):
            raise InputError(f"gate={text!r}: {part!r} gives no number: give it as in {name}=0.05.")
        most = LIMITS[name].most
        if not 0 <= found[name] <= most:
            raise InputError(f"gate={text!r}: {part!r}: give 0 {'or more' if most == math.inf else f'to {most:g}'}.")
    if not found:
        raise InputError(f"gate={text!r}: it says no limit: give some of kl=0.05,top1=0.97,ppl=1.05,checks=0.")
    return found


def judge(comparison: Comparison, limits: Mapping[str, float]) -> list[Verdict]:
    """Each checkpoint against each limit; what is not known is not within."""
    return [verdict(side, name, allowed) for side in comparison.others for name, allowed in limits.items()]


def verdict(side: Side, name: str, allowed: float) -> Verdict:
    rule = LIMITS[name]
    found = rule.of(side)
    if found is not None and rule.within(found, allowed):
        return Verdict(side.name, side.known.digest, name, allowed, found, True)
    each = 0 if name == "checks" else allowed
    beyond: list[tuple[Any, Run]] = [
        (value, run) for run in side.runs if (value := rule.of_run(run)) is not None and not rule.within(value, each)
    ]
    beyond.sort(key=lambda pair: pair[0], reverse=rule.within is operator.le)
    return Verdict(side.name, side.known.digest, name, allowed, found, False, tuple(run for _, run in beyond))

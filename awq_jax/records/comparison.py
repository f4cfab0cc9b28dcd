"""A comparison: what checkpoints answered beside their base, put together from a store and in need of no model."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

from awq_jax.records.checks import failed
from awq_jax.records.prompt import Prompt
from awq_jax.records.store import Key, Known, Store


@dataclass(frozen=True)
class Setting:
    """How answers are taken: a name for it, and what decides them."""

    name: str
    values: Mapping[str, Any]

    @property
    def key(self) -> str:
        return json.dumps(self.values, sort_keys=True)


@dataclass(frozen=True)
class Run:
    """One prompt, asked in one way of one checkpoint.

    Args:
      answer: what was said, None if it was never asked.
      base: what the base said.
      distance: from the base along what the base said, None where that is not known.
    """

    prompt: Prompt
    setting: Setting
    answer: Mapping[str, Any] | None
    base: Mapping[str, Any] | None
    distance: Mapping[str, Any] | None

    @cached_property
    def failed(self) -> tuple[str, ...]:
        """Checks that the answer does not pass."""
        return failed(self.prompt.checks, self.answer["text"]) if self.answer else ()

    @cached_property
    def lost(self) -> tuple[str, ...]:
        """Checks that the base's answer passes and this one does not."""
        passed = set(self.prompt.checks) - set(failed(self.prompt.checks, self.base["text"])) if self.base else set()
        return tuple(name for name in self.failed if name in passed)

    @cached_property
    def diverges(self) -> int | None:
        """The first token that is not the base's, which one of the answers may lack; None for the same answer."""
        if not (self.answer and self.base):
            return None
        both = enumerate(zip_longest(ended(self.answer), ended(self.base)))
        return next((k for k, (a, b) in both if a != b), None)

    @property
    def kl(self) -> float | None:
        """The mean of KL along the base's answer."""
        return mean(self.distance["kl"]) if self.distance else None

    @property
    def top1(self) -> float | None:
        """The share of places with the same likeliest outcome."""
        return mean(self.distance["same"]) if self.distance else None

    @property
    def ppl(self) -> float | None:
        """The perplexity of the base's answer, relative to the base's own."""
        return math.exp(mean(self.distance["more"])) if self.distance else None


@dataclass(frozen=True)
class Side:
    """A checkpoint of a comparison, with its runs: all prompts by one setting, then by the next."""

    known: Known
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        return self.known.name

    def all_of(self, field: str) -> list[float]:
        """What is known along all of the base's answers."""
        return [x for run in self.runs if run.distance for x in run.distance[field]]

    @cached_property
    def kl(self) -> float | None:
        """The mean over all tokens."""
        return mean(self.all_of("kl"))

    @cached_property
    def kl_p99(self) -> float | None:
        ordered = sorted(self.all_of("kl"))
        return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))] if ordered else None

    @cached_property
    def top1(self) -> float | None:
        return mean(self.all_of("same"))

    @cached_property
    def ppl(self) -> float | None:
        more = mean(self.all_of("more"))
        return None if more is None else math.exp(more)

    @cached_property
    def checks(self) -> int | None:
        """How many runs lost a check; None if nothing was asked."""
        asked = [run for run in self.runs if run.answer and run.base]
        return sum(bool(run.lost) for run in asked) if asked else None

    @cached_property
    def speed(self) -> float | None:
        """Tokens a second, of decoding."""
        answers = [run.answer for run in self.runs if run.answer and len(run.answer["tokens"]) > 1]
        seconds = sum(a["decode"] for a in answers)
        return sum(len(a["tokens"]) - 1 for a in answers) / seconds if seconds else None


@dataclass(frozen=True)
class Comparison:
    """A base, the checkpoints beside it, and what else the store knows of this base on these prompts."""

    base: Side
    others: tuple[Side, ...]
    prompts: tuple[Prompt, ...]
    settings: tuple[Setting, ...]
    history: tuple[Side, ...]
    made: float


def compared(
    store: Store, prompts: Sequence[Prompt], base: Known, others: Sequence[Known], settings: Sequence[Setting]
) -> Comparison:
    """The comparison that a store holds.

    Args:
      base, others: checkpoints under the names to show.
    """
    side = lambda known: Side(known, tuple(runs(store, prompts, base.digest, known.digest, settings)))
    sides = {known.digest: side(known) for known in others}
    past = [sides.get(known.digest) or side(known) for known in store.checkpoints() if known.digest != base.digest]
    history = sorted((one for one in past if one.kl is not None), key=lambda one: one.known.seen)
    return Comparison(
        side(base), tuple(side(known) for known in others), tuple(prompts), tuple(settings), tuple(history), time.time()
    )


def runs(
    store: Store, prompts: Sequence[Prompt], base: str, checkpoint: str, settings: Sequence[Setting]
) -> Iterator[Run]:
    """Of all prompts by each setting what is known."""
    for setting in settings:
        for prompt in prompts:
            key = Key(prompt.version, checkpoint, "", setting.key)
            reference = store.get(key._replace(checkpoint=base))
            distance = store.get(key._replace(base=base)) if checkpoint != base else None
            yield Run(prompt, setting, store.get(key), reference, distance)


def ended(answer: Mapping[str, Any]) -> list[int]:
    """The tokens of an answer, -1 for its end if it came."""
    return [*answer["tokens"], *([-1] if answer["stopped"] else [])]


def mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None

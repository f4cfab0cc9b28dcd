"""A comparison as one HTML page that needs nothing but itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, StrictUndefined

from awq_jax.memory import size
from awq_jax.records.comparison import Comparison, Run, Side
from awq_jax.records.drawn import distribution, heats, history
from awq_jax.records.gate import Verdict
from awq_jax.records.marked import along, differences

LARGEST = 3_000_000
"""Bytes of the page; answers of the prompts that differ least are left out of a larger one."""


def page(comparison: Comparison, verdicts: Sequence[Verdict] = (), largest: int = LARGEST) -> str:
    """The page, of `largest` bytes at most if the answers are what makes it large."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "percent": percent, "size": size}
    template = environment.from_string(resources.files("awq_jax").joinpath("data", "report.html.j2").read_text("utf-8"))
    shown = len(comparison.prompts)
    while True:
        text = template.render(view(comparison, verdicts, shown))
        if (n := len(text.encode())) <= largest or not shown:
            return text
        shown = min(shown - 1, int(0.9 * shown * largest / n))


def view(comparison: Comparison, verdicts: Sequence[Verdict], shown: int) -> dict[str, Any]:
    """What the template is told."""
    comparison = renamed(comparison)
    others = comparison.others
    measured = [side for side in others if side.all_of("kl")]
    prompts = [asked(comparison, k) for k in range(len(comparison.prompts))]
    ranked = sorted(prompts, key=lambda one: -one["worst"])
    for one in ranked[shown:]:
        one["settings"] = []
    largest = max(side.known.nbytes for side in (comparison.base, *others)) or 1
    return {
        "base": comparison.base.name,
        "made": time.strftime("%d %B %Y, %H:%M UTC", time.gmtime(comparison.made)),
        "cards": [card(side, comparison, verdicts, largest) for side in (comparison.base, *others)],
        "heading": others[0].name if len(others) == 1 else f"{len(others)} checkpoints",
        "names": [side.name for side in others],
        "settings": [f"{s.name}: {', '.join(f'{k} {v}' for k, v in s.values.items())}" for s in comparison.settings],
        "distributions": [distribution(side) for side in measured],
        "heats": heats(others),
        "history": history(comparison.history, [side.known.digest for side in others]),
        "prompts": prompts,
        "tags": sorted({tag for prompt in comparison.prompts for tag in prompt.tags}),
        "left_out": len(prompts) - shown,
        "gated": bool(verdicts),
        "passed": all(verdict.passed for verdict in verdicts),
    }


def renamed(comparison: Comparison) -> Comparison:
    """The same with the last part of each checkpoint's path for its name, if that tells them apart."""
    sides = (comparison.base, *comparison.others, *comparison.history)
    short = {side.known.digest: PurePath(side.name).name or side.name for side in sides}
    if len(set(short.values())) < len(short):
        return comparison
    name = lambda side: replace(side, known=side.known._replace(name=short[side.known.digest]))
    base, others, history = (
        name(comparison.base),
        *(tuple(map(name, of)) for of in (comparison.others, comparison.history)),
    )
    return replace(comparison, base=base, others=others, history=history)


def card(side: Side, comparison: Comparison, verdicts: Sequence[Verdict], largest: int) -> dict[str, Any]:
    """The figures of a checkpoint."""
    is_base = side is comparison.base
    anchors = {prompt.name: k for k, prompt in enumerate(comparison.prompts)}
    mine = [one for one in verdicts if not is_base and one.digest == side.known.digest]
    checked = sum(bool(run.prompt.checks) for run in side.runs)
    failed = sum(bool(run.failed) for run in side.runs)
    return {
        "name": side.name,
        "is_base": is_base,
        "digest": side.known.digest[:12],
        "kl": side.kl,
        "p99": side.kl_p99,
        "top1": side.top1,
        "ppl": side.ppl,
        "checked": checked,
        "failed": failed,
        "lost": None if is_base else side.checks,
        "same": sum(run.diverges is None and bool(run.answer) for run in side.runs),
        "runs": len(side.runs),
        "nbytes": side.known.nbytes,
        "share": side.known.nbytes / largest,
        "speed": side.speed,
        "verdicts": [(one, [(name, anchors[name]) for name in one.names]) for one in mine],
    }


def asked(comparison: Comparison, k: int) -> dict[str, Any]:
    """One prompt with all answers to it."""
    prompt, n = comparison.prompts[k], len(comparison.prompts)
    runs = [[side.runs[k + n * s] for side in comparison.others] for s in range(len(comparison.settings))]
    kls = [[run.kl for of in runs if (run := of[i]).kl is not None] for i in range(len(comparison.others))]
    each = [max(found) if found else None for found in kls]
    everything = [run for of in runs for run in of]
    return {
        "anchor": k,
        "name": prompt.name,
        "version": prompt.version[:8],
        "tags": prompt.tags,
        "text": prompt.text,
        "checks": dict(prompt.checks),
        "kls": each,
        "worst": max((kl for kl in each if kl is not None), default=-1.0),
        "differs": any(run.diverges is not None for run in everything),
        "lost": any(run.lost for run in everything),
        "diverges": min((run.diverges for run in everything if run.diverges is not None), default=10**9),
        "settings": [
            {"name": setting.name, "base": comparison.base.runs[k + n * s], "others": [told(run) for run in runs[s]]}
            for s, setting in enumerate(comparison.settings)
        ],
    }


def told(run: Run) -> dict[str, Any]:
    """One answer beside the base's, in pieces."""
    both = run.answer and run.base
    return {
        "run": run,
        "differences": differences(run.base["text"], run.answer["text"]) if both else [],
        "along": along(run.base, run.distance["kl"]) if run.base and run.distance else [],
    }


def number(value: float | None, digits: int = 3) -> str:
    """A number to read; a dash for what is not known."""
    if value is None:
        return "\u2013"
    return f"{value:.{digits}f}" if value >= 10**-digits or not value else f"{value:.0e}"


def percent(value: float | None, digits: int = 1) -> str:
    return "\u2013" if value is None else f"{100 * value:.{digits}f}\u2009%"

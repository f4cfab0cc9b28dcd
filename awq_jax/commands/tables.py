"""What the command line shows: tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from awq_jax.memory import size
from awq_jax.records.comparison import Comparison
from awq_jax.transforms.quantize import SiteReport
from awq_jax.transforms.tune import Tuned


def sites_table(sites: Iterable[SiteReport], worst: int = 10) -> Table:
    """The sites with the largest relative error first."""
    ordered = sorted(sites, key=lambda s: -s.error)
    shown = min(worst, len(ordered))
    table = Table(title=f"Output error on the calibration text: worst {shown} of {len(ordered)} sites")
    table.add_column("site")
    table.add_column("bits", justify="right")
    table.add_column("group", justify="right")
    table.add_column("error", justify="right")
    table.add_column("nearest", justify="right")
    table.add_column("note")
    for s in ordered[:worst]:
        bits, group = (str(s.spec.bits), str(s.spec.group_size)) if s.spec else ("", "")
        table.add_row(escape(s.name), bits, group, f"{s.error:.2%}", f"{s.nearest_error:.2%}", s.note)
    return table


def summary(before: int, half: int, after: int, seconds: Mapping[str, float]) -> Group:
    """Sizes (the source as stored, in 16 bits, quantized), and seconds by stage."""
    sizes = Table(title="Size")
    for column in ("source", "in 16 bits", "quantized", "times smaller than in 16 bits"):
        sizes.add_column(column, justify="right")
    sizes.add_row(size(before), size(half), size(after), f"{half / max(after, 1):.2f}")
    times = Table(title="Seconds")
    for stage in (*seconds, "all"):
        times.add_column(stage, justify="right")
    times.add_row(*(f"{s:.1f}" for s in (*seconds.values(), sum(seconds.values()))))
    return Group(sizes, times)


def scores_table(rows: Mapping[str, Any]) -> Table:
    """Scores by the model's name."""
    compared = any(s.kl is not None for s in rows.values())
    table = Table(title="How close to the dense model" if compared else "Perplexity")
    table.add_column("model")
    for column in ("perplexity", "KL to dense", "same top-1"):
        table.add_column(column, justify="right")
    for name, s in rows.items():
        kl = "" if s.kl is None else f"{s.kl:.4f}"
        top1 = "" if s.top1 is None else f"{s.top1:.1%}"
        table.add_row(escape(name), f"{s.perplexity:.2f}", kl, top1)
    return table


def compared_table(found: Comparison) -> Table:
    """Checkpoints beside their base."""
    table = Table(title=f"{len(found.prompts)} prompts, compared with {escape(found.base.name)}")
    table.add_column("checkpoint")
    for column in ("KL", "99 % below", "same top-1", "perplexity x", "checks lost", "size", "tokens/s"):
        table.add_column(column, justify="right")
    told = lambda value, form: "" if value is None else format(value, form)
    for side in (found.base, *found.others):
        table.add_row(
            escape(side.name),
            told(side.kl, ".4f"),
            told(side.kl_p99, ".3f"),
            told(side.top1, ".1%"),
            told(side.ppl, ".3f"),
            "" if side is found.base else told(side.checks, "d"),
            size(side.known.nbytes),
            told(side.speed, ".1f"),
        )
    return table


def tunings_table(found: Iterable[Tuned]) -> Table:
    """The fastest tiling of each case, and how much it gains."""
    table = Table(title="Fastest kernels")
    for column in ("rows", "weight", "kernel", "us", "times as fast as before"):
        table.add_column(column, justify="right")
    for one in found:
        rows, weight = str(one.case.m), f"{one.case.k} x {one.case.n}"
        if one.best is None:
            table.add_row(rows, weight, escape(next(iter(one.failed.values()), "")), "", "")
            continue
        t = one.best
        tiles = f"{t.kernel} {t.bm} x {t.bn}" if t.bm else t.kernel
        table.add_row(rows, weight, tiles, f"{1e6 * one.seconds[t]:.1f}", f"{one.gain:.2f}")
    return table


def console() -> Console:
    return Console(highlight=False, emoji=False)


def say(text: str) -> None:
    """Text as it is, whatever the width of the terminal."""
    console().print(text, markup=False, soft_wrap=True)

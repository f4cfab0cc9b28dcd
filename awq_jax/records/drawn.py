"""What the page draws, as numbers: bars of distributions, cells of heat maps, points of a history."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from typing import Any

from awq_jax.records.comparison import Side

FROM, TO, BINS = -6.0, 1.5, 60
"""Powers of ten between which KL is drawn."""
LEVELS = (0.02, 0.1, 0.3, 1.0, 3.0)
"""Nats from which on a token is coloured, stronger from one to the next."""
DEPTH = re.compile(r"\d+")


def level(kl: float) -> int:
    """How strongly a token is coloured, 0 for not at all."""
    return sum(kl >= start for start in LEVELS)


def place(kl: float) -> float:
    """Where KL is from the left of its axis to the right, 0 to 1."""
    return min(1.0, max(0.0, (math.log10(max(kl, 1e-12)) - FROM) / (TO - FROM)))


def distribution(side: Side) -> dict[str, Any]:
    """How many tokens have which KL: heights of bars, 0 to 1, and the places of median and 99th percentile."""
    values = sorted(side.all_of("kl"))
    counts = [0] * BINS
    for kl in values:
        counts[min(BINS - 1, int(place(kl) * BINS))] += 1
    middle = values[len(values) // 2]
    return {
        "name": side.name,
        "heights": [n / max(counts) for n in counts],
        "median": middle,
        "p99": side.kl_p99,
        "places": (place(middle), place(side.kl_p99 or 0.0)),
    }


def heat(side: Side, least: float, most: float) -> dict[str, Any]:
    """Errors of sites: kinds as rows, depth as columns, colour from 0 to 1 between two errors on a log scale."""
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for name, bits, error, nearest in side.known.sites:
        found = DEPTH.search(name)
        kind = re.sub(r"/kernel$|/w$|\.weight$", "", name.replace(found[0], "", 1) if found else name)
        span = math.log(most / least) if most > least else 1.0
        shade = math.log(max(error, least) / least) / span
        cell = {"name": name, "bits": bits, "error": error, "nearest": nearest, "shade": round(shade, 2)}
        rows.setdefault(kind, {})[int(found[0]) if found else 0] = cell
    common = shared([kind.split("/") for kind in rows])
    return {
        "name": side.name,
        "rows": [("/".join(kind.split("/")[common:]) or kind, cells) for kind, cells in rows.items()],
        "depth": 1 + max((k for cells in rows.values() for k in cells), default=0),
    }


def shared(paths: Sequence[Sequence[str]]) -> int:
    """How many parts all paths begin with."""
    return next((k for k, parts in enumerate(zip(*paths, strict=False)) if len({*parts}) > 1), 0)


def heats(sides: Sequence[Side]) -> dict[str, Any] | None:
    """The heat maps of all sides whose sites are known, on one scale."""
    errors = [site[2] for side in sides for site in side.known.sites if site[2] > 0]
    if not errors:
        return None
    least, most = min(errors), max(errors)
    return {"least": least, "most": most, "maps": [heat(side, least, most) for side in sides if side.known.sites]}


def history(sides: Sequence[Side], shown: Sequence[str]) -> list[dict[str, Any]]:
    """Checkpoints in the order in which they were met: where each point is, and whether this page compares it."""
    most = max((side.kl or 0.0 for side in sides), default=0.0) or 1.0
    return [
        {
            "x": (k + 0.5) / len(sides),
            "y": (side.kl or 0.0) / most,
            "name": side.name,
            "kl": side.kl,
            "day": time.strftime("%d %b %Y", time.gmtime(side.known.seen)),
            "shown": side.known.digest in shown,
        }
        for k, side in enumerate(sides)
    ]

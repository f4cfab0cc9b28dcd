"""Answers in pieces that a page colours: by what differs from another, or by KL along them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from awq_jax.records.drawn import level

WORDS = re.compile(r"\s+|\w+|[^\w\s]")
LONGEST = 4000
"""Words of texts that are compared word by word; what follows counts as different where it is."""


def differences(base: str, other: str) -> list[tuple[str, str]]:
    """The other text in pieces: "same", "new" for what the base has not, "gone" (without words) where it has more."""
    a, b = WORDS.findall(base), WORDS.findall(other)
    found: list[tuple[str, str]] = []
    matcher = difflib.SequenceMatcher(None, a[:LONGEST], b[:LONGEST], autojunk=False)
    for what, _, _, start, end in matcher.get_opcodes():
        kind = {"equal": "same", "delete": "gone"}.get(what, "new")
        found.append((kind, "".join(b[start:end])))
    if rest := "".join(b[LONGEST:]):
        found.append(("same" if b[LONGEST:] == a[LONGEST:] else "new", rest))
    return found


def along(said: Mapping[str, Any], kl: list[float]) -> list[tuple[int, str, float]]:
    """An answer in pieces with how strongly each is coloured and its KL; neighbours without colour are one."""
    text, found, at = said["text"], [], 0
    for end, value in zip(said["ends"], kl, strict=False):
        strength, piece = level(value), text[at:end]
        at = max(at, end)
        if found and strength == found[-1][0] == 0:
            found[-1] = (0, found[-1][1] + piece, 0.0)
        elif piece:
            found.append((strength, piece, value))
    if said["stopped"] and kl:
        found.append((level(kl[-1]), " \u25a0", kl[-1]))
    return found

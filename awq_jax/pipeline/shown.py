"""Data where words should be: texts that are JSON, or what Python shows of objects."""

from __future__ import annotations

import ast
import json
import re
import warnings
from contextlib import suppress
from itertools import islice
from typing import Any

ENDS = {"[": "]", "{": "}", "(": ")", '"': '"', "'": "'", "b": "'\""}
BEGINS = re.compile(
    r"""[\[({]\s*(?:["'\[({\d.+-]|b["']|null|None|[tT]rue|[fF]alse|NaN)|b["']|["']["'\\]*\s*(?:[\[({]|b["'])"""
)
"""As a value begins, alone or in a string: what parsers need not be asked about is quick."""
KEYED = re.compile(r"""[\[(\s]*\{\s*(['"])[^'"\n]*\1\s*:""")
"""As an object begins, also one that does not parse: with nan in it, cut, or without commas as numpy shows them."""
LINES = re.compile(r"[^\n]+")
MOST = 10_000
"""Lines and blocks that are looked at."""
BLOCKS = re.compile(r"^[\[{(].*(?:\n(?![\[{(]).*)*", re.MULTILINE)
"""From a line that a bracket begins to the next of them."""


def shown(text: str) -> Any:
    """What a text as a whole holds, as JSON or as Python shows it: a list, dict, tuple, set or bytes; None for words.

    What is in a string within the string counts, "[1]" of a footnote and the like do not.
    """
    text = text.strip()
    if len(text) < 2 or text[-1] not in ENDS.get(text[0], "") or not BEGINS.match(text):
        return None
    for parse in (json.loads, ast.literal_eval):
        with (
            warnings.catch_warnings(),
            suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError),
        ):
            warnings.simplefilter("ignore")
            found = parse(text)
            if isinstance(found, str):
                return shown(found)
            return None if is_mark(found) else found
    return None


def is_mark(found: Any) -> bool:
    """Whether this holds nothing, or is one number or name between brackets."""
    if not found or not isinstance(found, list | dict | tuple | set | bytes):
        return True
    single = isinstance(found, list | tuple | set) and len(found) == 1
    return single and all(isinstance(one, int | float | None) for one in found)


def is_data(text: str) -> bool:
    """Whether a text is data rather than words: as a whole, or in most of its lines or of the blocks between them."""
    return one_value(text) or mostly(text, LINES) or mostly(text, BLOCKS)


def mostly(text: str, part: re.Pattern[str]) -> bool:
    """Whether values take more than half of a text up to the last of its parts."""
    held, end = 0, 0
    for found in islice(part.finditer(text), MOST):
        held, end = held + len(found[0]) * one_value(found[0]), found.end()
    return 2 * held > end


def one_value(text: str) -> bool:
    """Whether all of a text is one value, maybe with the comma of a list after it."""
    text = text.strip().rstrip(",")
    return bool(text[-1:] in ("]", "}", ")") and KEYED.match(text)) or shown(text) is not None

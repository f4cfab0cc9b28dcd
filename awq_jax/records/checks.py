"""What an answer has to be: each check is a function of what was wanted and the answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any


def contains(wanted: Any, answer: str) -> bool:
    """The text, or each of several, is in the answer, in whatever case."""
    return all(text.casefold() in answer.casefold() for text in listed(wanted))


def regex(wanted: Any, answer: str) -> bool:
    """The regular expression matches somewhere."""
    return bool(re.search(wanted, answer))


def is_json(wanted: Any, answer: str) -> bool:
    """The answer is JSON and nothing else; with an object wanted, one that has its fields with their values."""
    try:
        found = json.loads(answer)
    except ValueError:
        return False
    if wanted is True:
        return True
    return isinstance(found, dict) and all(key in found and found[key] == value for key, value in wanted.items())


def expected(wanted: Any, answer: str) -> bool:
    """The answer is this text, but for case and the spaces around words."""
    return answer.casefold().split() == wanted.casefold().split()


CHECKS: dict[str, Callable[[Any, str], bool]] = {
    "contains": contains,
    "regex": regex,
    "json": is_json,
    "expected": expected,
}


def listed(wanted: Any) -> list[Any]:
    return wanted if isinstance(wanted, list) else [wanted]


def check_checks(checks: Mapping[str, Any]) -> None:
    """Refuse checks that cannot be made.

    Raises:
      ValueError: says which, and what it should be.
    """
    for name, wanted in checks.items():
        texts = isinstance(wanted, str) or (name == "contains" and isinstance(wanted, list) and wanted)
        if name == "json" and not (wanted is True or isinstance(wanted, dict)):
            raise ValueError(f"json is {wanted!r}: give true, or an object with the fields that the answer must have")
        if name != "json" and not (texts and all(isinstance(text, str) and text for text in listed(wanted))):
            raise ValueError(f"{name} is {wanted!r}: give a text that is not empty")
        if name == "regex":
            try:
                re.compile(wanted)
            except re.error as e:
                raise ValueError(f"regex {wanted!r} is none ({e})") from e


def failed(checks: Mapping[str, Any], answer: str) -> tuple[str, ...]:
    """The names of the checks that an answer does not pass."""
    return tuple(name for name, wanted in checks.items() if not CHECKS[name](wanted, answer))

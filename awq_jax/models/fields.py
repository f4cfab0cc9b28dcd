"""Fields of a config.json, each of the type and in the range that a model can be made of; null is as if left out."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

LARGEST = 1 << 24
"""No size of a model is beyond; a damaged one would take all memory before its tensors are looked at."""

LARGEST_REAL = 1e38
"""What float32, in which angles and norms are computed, can hold."""

NEEDED = object()
"""The default of a field that has none."""


def whole(found: Mapping[str, Any], key: str, default: Any = NEEDED, where: str = "the config") -> Any:
    """A size or a count, 1 .. LARGEST."""
    return _field(found, key, default, where, f"a whole number from 1 to {LARGEST}", _is_whole)


def real(found: Mapping[str, Any], key: str, default: Any = NEEDED, where: str = "the config") -> float:
    """A positive number, as a float."""
    return float(_field(found, key, default, where, "a positive number", _is_positive))


def flag(found: Mapping[str, Any], key: str, default: bool) -> bool:
    """true or false."""
    return _field(found, key, default, "the config", "true or false", lambda x: isinstance(x, bool))


def mapping(found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object; an empty one where there is none, or null."""
    return _field(found, key, None, "the config", "an object", lambda x: isinstance(x, Mapping)) or {}


def _field(
    found: Mapping[str, Any], key: str, default: Any, where: str, expected: str, fits: Callable[[Any], bool]
) -> Any:
    value = default if found.get(key) is None else found[key]
    if value is NEEDED:
        raise ValueError(f"{where} lacks {key!r}; it has {sorted(found)}.")
    if value is None and default is None:
        return None
    if not fits(value):
        raise ValueError(f"{where} has {key}={reprlib.repr(value)}: expected {expected}.")
    return value


def _is_whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 1 <= x <= LARGEST


def _is_positive(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < LARGEST_REAL

"""Fields of a config.json, each of the type and in the range that a model can be made of.

null is as if left out where that means none or false; where it means a number, transformers takes no null for it, or
for something else, and it is refused.

A config is read strictly: a field that a model's maker set and that nothing here reads is refused by name.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

LARGEST = 1 << 24
"""No size of a model is beyond; a damaged one would take all memory before its tensors are looked at."""

LARGEST_REAL = 1e38
"""What float32, in which angles and norms are computed, can hold."""

NEEDED = object()
"""The default of a field that has none."""

LAYERS = 10_000
"""No model has more layers."""


class NotComputed(ValueError):
    """A field of a config says what nothing here computes, and transformers' own code may."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(why)
        self.field = field


class Watched(Mapping[str, Any]):
    """A mapping that knows which of its fields were asked for."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.found, self.asked = found, set[str]()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return self.found[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def unread(self) -> dict[str, Any]:
        """The fields that were not asked for and say something."""
        neutral = lambda value: value is None or value is False or value in ("", [], {})
        return {k: v for k, v in self.found.items() if k not in self.asked and not neutral(v)}

    def refuse_unread(self, where: str, harmless: Sequence[str] = ()) -> None:
        """Passes if nothing but `harmless` is unread."""
        for key, value in self.unread().items():
            if key not in harmless:
                raise NotComputed(key, f"{where} {key}={reprlib.repr(value)}, which this model does not compute.")


class Spelled(Mapping[str, Any]):
    """A config.json under Llama's names, where it has others.

    Args:
      names: Llama's name -> the file's, which is no name here.
    """

    def __init__(self, found: Mapping[str, Any], **names: str) -> None:
        self.found, self.names = found, names
        self.llamas = {name: llamas for llamas, name in names.items()}

    def __getitem__(self, key: str) -> Any:
        if key in self.llamas:
            raise KeyError(key)
        return self.found[self.names.get(key, key)]

    def __iter__(self) -> Iterator[str]:
        # A field that has a Llama's name in a file of other names says nothing.
        return (self.llamas.get(key, key) for key in self.found if key not in self.names)

    def __len__(self) -> int:
        return sum(key not in self.names for key in self.found)


def whole(
    found: Mapping[str, Any], key: str, default: Any = NEEDED, where: str = "the config", *, most: int = LARGEST
) -> Any:
    """A size or a count, 1 .. most."""
    fits = lambda x: isinstance(x, int) and not isinstance(x, bool) and 1 <= x <= most
    return _field(found, key, default, where, f"a whole number from 1 to {most}", fits)


def real(found: Mapping[str, Any], key: str, default: Any = NEEDED, where: str = "the config") -> Any:
    """A positive number, as a float."""
    value = _field(found, key, default, where, "a positive number", _is_positive)
    return value if value is None else float(value)


def share(found: Mapping[str, Any], key: str, default: float, where: str = "the config") -> float:
    """A number above 0, at most 1."""
    return float(
        _field(found, key, default, where, "a number above 0, at most 1", lambda x: _is_positive(x) and x <= 1)
    )


def each_real(found: Mapping[str, Any], key: str, n: int, where: str = "the config") -> tuple[float, ...]:
    """`n` positive numbers."""
    fits = lambda x: isinstance(x, list) and len(x) == n and all(map(_is_positive, x))
    return tuple(map(float, _field(found, key, NEEDED, where, f"a list of {n} positive numbers", fits)))


def word(found: Mapping[str, Any], key: str, known: Sequence[str], default: Any = NEEDED) -> str:
    """One of the words that are `known`."""
    return _field(found, key, default, "the config", f"one of {', '.join(map(repr, known))}", lambda x: x in known)


def listed(found: Mapping[str, Any], key: str, n: int, known: Sequence[Any]) -> list[Any] | None:
    """A list of `n`, each one of those that are `known`; None where there is none."""
    fits = lambda x: isinstance(x, list) and len(x) == n and all(k in known for k in x)
    return _field(found, key, None, "the config", f"a list of {n}, each one of {', '.join(map(repr, known))}", fits)


def flag(found: Mapping[str, Any], key: str, default: bool) -> bool:
    """true or false."""
    return _field(found, key, default, "the config", "true or false", lambda x: isinstance(x, bool))


def mapping(found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object; an empty one where there is none, or null."""
    return _field(found, key, None, "the config", "an object", lambda x: isinstance(x, Mapping)) or {}


def _field(
    found: Mapping[str, Any], key: str, default: Any, where: str, expected: str, fits: Callable[[Any], bool]
) -> Any:
    there, value = key in found, found.get(key)
    key, file = (found.names.get(key, key), found.found) if isinstance(found, Spelled) else (key, found)
    if there and value is None and default is not None and default is not False:
        raise ValueError(f"{where} has {key}=null: expected {expected}.")
    if value is None and default is NEEDED:
        said = sorted(name for name, value in file.items() if value is not None)
        raise ValueError(f"{where} lacks {key!r}; it has {said}.")
    if value is None:
        return default
    if not fits(value):
        raise ValueError(f"{where} has {key}={reprlib.repr(value)}: expected {expected}.")
    return value


def _is_positive(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < LARGEST_REAL

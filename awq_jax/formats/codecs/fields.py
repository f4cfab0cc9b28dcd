"""Fields of a quantization_config, told by name where they are not what they should be."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from awq_jax.errors import InputError
from awq_jax.formats.codecs.codec import Specs
from awq_jax.weights.spec import WHOLE_COLUMN, QuantSpec

Matches = Callable[[str], bool]


def number(found: Mapping[str, Any], default: int, *names: str) -> int:
    """The whole number that a field holds, under the first of its names that is there."""
    name, value = next(((n, found[n]) for n in names if n in found), (names[0], default))
    if type(value) is not int:
        raise InputError(f"quantization_config's {name}={value!r}: expected a whole number.")
    return value


def flag(found: Mapping[str, Any], name: str, default: bool) -> bool:
    """The truth that a field holds."""
    value = found.get(name)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise InputError(f"quantization_config's {name}={value!r}: expected true or false.")
    return value


def spec(bits: int, group_size: int, symmetric: bool) -> QuantSpec:
    """A QuantSpec of fields, whose group size may be 0 for a whole column, too."""
    try:
        return QuantSpec(bits, group_size, symmetric)
    except ValueError as e:
        raise InputError(f"quantization_config's {e}") from e


def by_module(
    found: Mapping[str, Any], changes: Sequence[tuple[Matches, Any]], read: Callable[[Any], QuantSpec]
) -> Specs:
    """How each module is quantized: by the fields of the first change that matches its name, over those of all."""
    usual = read(found)
    others = [(matches, read({**found, **fields})) for matches, fields in changes if isinstance(fields, Mapping)]
    return lambda module: next((spec for matches, spec in others if matches(module)), usual)


def pattern(text: str) -> Matches:
    """Whether a name begins with what the regular expression matches."""
    try:
        return lambda module, compiled=re.compile(text): bool(compiled.match(module))
    except re.error as e:
        raise InputError(f"quantization_config's pattern {text!r} is not a regular expression: {e}.") from e


def column(group_size: Any) -> Any:
    """A group size, of which some tools say None or 0 where it is the whole column."""
    return WHOLE_COLUMN if group_size in (None, 0) and group_size is not False else group_size

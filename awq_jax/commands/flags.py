"""The command line's names for what the library calls by Python's: `group_size=64` is `--group-size 64` there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

from tyro.constructors import PrimitiveConstructorSpec

from awq_jax.near import did_you_mean


def as_flags(message: str, arguments: Iterable[str], spelled: Mapping[str, str], given: Sequence[str] = ()) -> str:
    """An error's message, which speaks of Python's arguments, in the command's words.

    Args:
      arguments: names that are flags of the command.
      spelled: what else it says in other words.
      given: what the user typed, left as it is where it is quoted: a folder may be called group_size=64.

    So are a field of a file, `config.json's group_size=64`, and what Python shows, `QuantSpec(bits=4)`.
    """
    typed = "|".join(sorted((re.escape(word) for word in given if "=" in word), key=len, reverse=True))
    others = "|".join(map(re.escape, spelled))
    value = r"True\b|'[^']*'|\"[^\"]*\"|"
    names = "|".join(map(re.escape, arguments))
    pattern = (
        rf"(?P<typed>{typed or '(?!)'}|\b[A-Z]\w*\([^()]*\))|(?P<other>{others or '(?!)'})|"
        rf"(?<!'s )\b(?P<name>{names})=(?P<value>{value})(?P<ends>(?!\S))?"
    )

    def spell(found: re.Match[str]) -> str:
        if found["name"] is None:
            return spelled.get(found[0], found[0])
        flag = "--" + found["name"].replace("_", "-")
        value = found["value"]
        if value == "True" or (not value and found["ends"] is not None):
            return flag
        return f"{flag} {shlex.quote(value[1:-1]) if value else ''}"

    return re.sub(pattern, spell, message)


def one_of(choices: Any) -> PrimitiveConstructorSpec[str]:
    """How a flag with a `Literal` of words is read: another word is told the nearest."""
    return one_word_of(get_args(choices))


def one_word_of(known: Iterable[str]) -> PrimitiveConstructorSpec[str]:
    """The same of a flag whose words are not those of a type."""
    return words_of([*known], lambda said: [said])


def some_of(known: Sequence[str]) -> PrimitiveConstructorSpec[str]:
    """The same of a flag that takes several words, with commas between them."""
    return words_of(known, lambda said: said.split(","))


def one_or_more() -> PrimitiveConstructorSpec[tuple[str, ...]]:
    """How a flag is read that may be left out, but not left empty: as `--calib $FILE` is where there is no FILE."""

    def read(words: list[str]) -> tuple[str, ...]:
        if not all(words or [""]):
            raise ValueError("give one or more, none of them empty, or leave the flag out.")
        return tuple(words)

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[STR [STR ...]]",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=list,
    )


def words_of(known: Sequence[str], split: Callable[[str], list[str]]) -> PrimitiveConstructorSpec[str]:
    """How a flag is read of which all words are known."""

    def read(words: list[str]) -> str:
        if odd := [word for word in split(words[0]) if word not in known]:
            raise ValueError(f"'{odd[0]}' is none of {', '.join(known)}{did_you_mean(odd[0], known)}.")
        return words[0]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(known)}}}",
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [str(value)],
    )

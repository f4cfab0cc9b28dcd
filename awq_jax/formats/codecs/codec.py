"""What a format says of one weight: a Codec is its parts, how they are made and read, what it holds, its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from awq_jax.errors import InputError
from awq_jax.formats.codecs.bits import WORD
from awq_jax.formats.codecs.codes import Codes
from awq_jax.weights.spec import QuantSpec

Shape = tuple[int, ...]
Arrays = Mapping[str, np.ndarray]
Specs = Callable[[str], QuantSpec]
"""The name of a module -> how its weight is quantized."""
GROUPS = (128, 64, 32)
OTHERWISE = "leave the site dense (skip=True in a rule), or write format='orbax', which holds anything"


@dataclass(frozen=True)
class Holds:
    """What weights a format has room for.

    Args:
      bits: widths of codes.
      groups: sizes of groups, -1 for a whole column; None for all.
      asymmetric: zero points may be others than the middle code.
      whole_words: outputs fill words of 32 bits, as where codes or zero points are packed across them.
      float_zeros: zero points may be any numbers.
      act_order: rows of a group may lie apart.
      mixed: modules may have bits and groups of their own.
      head: a quantized output head is read.
      stacks: weights of all experts are one array.
    """

    bits: Sequence[int] = (4,)
    groups: Sequence[int] | None = None
    asymmetric: bool = True
    whole_words: bool = True
    float_zeros: bool = False
    act_order: bool = False
    mixed: bool = True
    head: bool = True
    stacks: bool = False


@dataclass(frozen=True)
class Codec:
    """A format in which a module X has a few arrays, X.qweight and others, in place of X.weight.

    Args:
      name: as `format` is given.
      title: as errors say it.
      methods: (tool, layout) as declared in config.json.
      parts: names and types of the arrays; the first is there in every quantized module and in no other.
      optional: those of them that may be missing.
      if_asymmetric: those that a symmetric weight may lack.
      holds: what weights it has room for.
      size: (*lead, i, o) of a weight from the shapes of its parts.
      shapes: the shape of each part that a weight (*lead, i, o) needs.
      encode: the parts of a weight that it holds.
      decode: the exact inverse.
      read_config: what a declaration says of each module.
      about: the fields of config.json; from how each module is quantized, those left dense, and the usual way.
    """

    name: str
    title: str
    methods: Sequence[tuple[str, str]]
    parts: Mapping[str, Any]
    optional: Sequence[str]
    if_asymmetric: Sequence[str]
    holds: Holds
    size: Callable[[Mapping[str, Shape], QuantSpec], Shape]
    shapes: Callable[[Shape, QuantSpec], dict[str, Shape]]
    encode: Callable[[Codes], dict[str, np.ndarray]]
    decode: Callable[[Arrays, QuantSpec], Codes]
    read_config: Callable[[Mapping[str, Any]], Specs]
    about: Callable[[Mapping[str, QuantSpec], Sequence[str], QuantSpec], dict[str, Any]]


def encoded(codec: Codec, w: Codes, name: str = "the weight") -> dict[str, np.ndarray]:
    """The parts of a weight, of which it is checked that they give the weight back to the bit.

    Args:
      name: for the errors.

    Raises:
      InputError: what the format cannot hold.
    """
    if why := lacks(codec, w):
        raise InputError(f"{name} {why}.")
    parts = codec.encode(w)
    if differs := w.differs(codec.decode(parts, w.spec)):
        raise InputError(
            f"{name}: {codec.title} files do not give its {differs} back as it is: requantize it, or write "
            "format='orbax', which holds anything."
        )
    return {part: np.ascontiguousarray(a) for part, a in parts.items()}


def lacks(codec: Codec, w: Codes) -> str | None:
    """Why a format cannot hold the numbers of a weight that `check_fits` passed; None if it can."""
    holds, title = codec.holds, codec.title
    reasons = {
        f"has zero points that are no whole numbers, which {title} files cannot hold": not (
            w.whole or holds.float_zeros
        ),
        f"has groups of rows that lie apart (act order), which {title} files cannot hold": not (
            w.group_of is None or holds.act_order
        ),
        "has other zero points than the middle one, but is declared symmetric": w.spec.symmetric and not w.symmetric,
        f"is a stack of {w.q.shape[:-2]} matrices, {title} files hold matrices: write one expert at a time": not (
            w.q.ndim == 2 or holds.stacks
        ),
    }
    return next((why for why, found in reasons.items() if found), None)


def check_fits(codec: Codec, name: str, shape: Shape, spec: QuantSpec) -> None:
    """Passes if a file can hold a linear of shape (*lead, i, o); ask before any work starts.

    Raises:
      InputError: it cannot, and what to do.
    """
    if found := no_room(codec, shape, spec):
        why, remedy = found
        raise InputError(f"{name}: {why}: {remedy}{OTHERWISE}.")


def no_room(codec: Codec, shape: Shape, spec: QuantSpec) -> tuple[str, str] | None:
    """Why a file has no room for a linear of shape (*lead, i, o), and what of the spec to change; None if it has."""
    holds, title, (i, o) = codec.holds, codec.title, shape[-2:]
    if spec.bits not in holds.bits:
        nearest = min(holds.bits, key=lambda bits: abs(bits - spec.bits))
        return f"{title} files hold {listed(holds.bits)} bits, not {spec.bits}", f"use bits={nearest}, or "
    group = group_for(codec, i)
    remedy = f"use group_size={group}, " if group else ""
    if spec.padding(i):
        why = f"{i} input features do not divide by {spec.group(i)}, the group size, as {title} files need"
        return why, remedy
    if holds.groups is not None and spec.group_size not in holds.groups:
        return f"{title} files hold groups of {listed(holds.groups)}, not {spec.group_size}", remedy
    if not (spec.symmetric or holds.asymmetric):
        why = f"{title} files hold symmetric weights, as their readers differ about other zero points"
        return why, f"use symmetric=True, or format='{codec.name}_v2', or "
    if holds.whole_words and o * spec.bits % WORD:
        per = next(n for n in (4, 8, 16, 32) if n * spec.bits % WORD == 0)
        return f"{o} output features do not divide by {per}, as {title} files need", ""
    return None


def group_for(codec: Codec, i: int) -> int | None:
    """The largest group that a format knows and that divides the inputs."""
    return next((g for g in GROUPS if i % g == 0 and (codec.holds.groups is None or g in codec.holds.groups)), None)


def listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def groups_of(i: int, spec: QuantSpec) -> int:
    """How many groups a column of `i` rows has."""
    return -(-i // spec.group(i)) if i else 0


def turned(a: np.ndarray) -> np.ndarray:
    """[in, out] as [out, in], and back."""
    return a.swapaxes(-1, -2)


def usual(specs: Mapping[str, QuantSpec], default: QuantSpec) -> tuple[QuantSpec, dict[str, QuantSpec]]:
    """How most modules are quantized, and those that are otherwise."""
    found = list(specs.values())
    most = max(dict.fromkeys(found), key=found.count) if found else default
    return most, {name: spec for name, spec in specs.items() if spec != most}

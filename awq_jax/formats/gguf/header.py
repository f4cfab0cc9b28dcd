"""What stands before the data of a GGUF file: its metadata and where each tensor lies.

gguf.GGUFReader gives the same (the tests compare) but takes seconds for the vocabulary of a small model, as it makes
a numpy array of each string; this takes a tenth. Layout: docs/gguf.md of ggml-org/ggml.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from awq_jax.errors import InputError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_AXES = 4
DEFAULT_ALIGNMENT = 32
AGAIN = "download it again"


@dataclass(frozen=True)
class Entry:
    """One tensor: its shape in numpy's order (GGUF's reversed), its ggml type, its first byte and their number."""

    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    metadata: Mapping[str, Any]
    entries: Mapping[str, Entry]


def read_header(file: Path) -> Header:
    """The header of a GGUF file, version 2 or 3, little-endian.

    Raises:
      InputError: not a GGUF file, a version or byte order that is not read, cut short, damaged, tensors that do not
        follow one another without gaps as llama.cpp asks, or one in a type that the gguf package does not know.
    """
    if file.stat().st_size < 24:
        raise InputError(f"{file} has {file.stat().st_size} bytes: that is no GGUF file, {AGAIN}.")
    with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise InputError(
                f"{file} starts with {data[:4]!r}, not with b'GGUF': that is no GGUF file: give one, or the "
                "folder of a Hugging Face model."
            )
        cursor = Cursor(data, 4)
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise InputError(f"{file} is GGUF version {version} or big-endian: convert it with a newer llama.cpp.")
        try:
            tensors, pairs = cursor.scalar("Q"), cursor.scalar("Q")
            metadata = {cursor.string(): cursor.value(cursor.scalar("I")) for _ in range(pairs)}
            table = {cursor.string(): tensor_info(cursor) for _ in range(tensors)}
            alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
            start = end = aligned(cursor.at, alignment)
        except (struct.error, ValueError, OverflowError, MemoryError, RecursionError) as e:
            raise InputError(f"{file}: the header is cut short or damaged ({e}): {AGAIN}.") from e
        if len(metadata) < pairs or len(table) < tensors:
            raise InputError(f"{file}: the header is damaged, it names something twice: {AGAIN}.")
        entries = {name: entry(file, name, start, *info) for name, info in table.items()}
        for name, e in entries.items():
            if e.offset != end:
                raise InputError(
                    f"{file}: {name} starts at byte {e.offset}, the tensors before it and their padding end at "
                    f"{end}: the file is damaged, {AGAIN}."
                )
            end = aligned(e.offset + e.nbytes, alignment)
            if e.offset + e.nbytes > len(data):
                raise InputError(
                    f"{file} is cut short: {name} ends at byte {e.offset + e.nbytes} and the file has {len(data)}: "
                    f"{AGAIN}."
                )
    return Header(metadata, entries)


class Cursor:
    """Reads one value after another. struct.error where the file ends too early, ValueError for what cannot be."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at

    def scalar(self, code: str) -> Any:
        return self.scalars(code, 1)[0]

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{count}{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}") * count
        return values

    def string(self) -> str:
        length = self.scalar("Q")
        if self.at + length > len(self.data):
            raise ValueError(f"a string of {length} bytes at byte {self.at}")
        text = self.data[self.at : self.at + length]
        self.at += length
        return text.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"a value of type {kind} at byte {self.at}")
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in SCALARS:
            return list(self.scalars(SCALARS[kind], count))
        return [self.value(kind) for _ in range(count)]


def tensor_info(cursor: Cursor) -> tuple[tuple[int, ...], int, int]:
    """Shape in numpy's order, ggml type, offset in the data."""
    axes = cursor.scalar("I")
    if axes > MOST_AXES:
        raise ValueError(f"a tensor of {axes} axes at byte {cursor.at}")
    shape = cursor.scalars("Q", axes)[::-1]
    return shape, cursor.scalar("I"), cursor.scalar("Q")


def entry(file: Path, name: str, start: int, shape: tuple[int, ...], kind: int, offset: int) -> Entry:
    try:
        ggml_type = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    except (ValueError, KeyError) as e:
        raise InputError(
            f"{file}: {name} is stored in ggml type {kind}, which the installed gguf package does not know: upgrade "
            "gguf, or take a file in another type, such as Q8_0."
        ) from e
    if shape and shape[-1] % block:
        raise InputError(f"{file}: {name} has rows of {shape[-1]}, no multiple of {ggml_type.name}'s {block}: {AGAIN}.")
    return Entry(shape, ggml_type, start + offset, math.prod(shape) // block * block_bytes)


def aligned(at: int, alignment: int) -> int:
    """The next byte where data may start."""
    if alignment not in (1 << k for k in range(3, 20)):
        raise ValueError(f"general.alignment is {alignment}")
    return -(-at // alignment) * alignment

"""Codes of 2 to 8 bits as a dense little-endian bit stream along the last axis, in int32 words: what all formats do."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int32, UInt8

TOGETHER = 8
"""So many codes fill whole bytes, as many as a code has bits."""
WORD = 32


def words(codes: UInt8[np.ndarray, "*lead n"], bits: int) -> Int32[np.ndarray, "*lead w"]:
    """The words of `codes`, the last one filled up with zeros.

    Example:
      >>> hex(words(np.arange(8, dtype=np.uint8), 4)[0])
      '0x76543210'
    """
    *lead, n = codes.shape
    whole = np.pad(codes, [(0, 0)] * len(lead) + [(0, -n % WORD)]).reshape(*lead, -1, TOGETHER)
    stream = np.zeros((*whole.shape[:-1], bits), np.uint8)
    for byte, code, shift in overlaps(bits):
        stream[..., byte] |= whole[..., code] << shift if shift >= 0 else whole[..., code] >> -shift
    return stream.reshape(*lead, -1).view("<i4")[..., : n_words(n, bits)]


def codes(packed: Int32[np.ndarray, "*lead w"], bits: int, n: int | None = None) -> UInt8[np.ndarray, "*lead n"]:
    """The codes that `words` stored.

    Args:
      n: how many; None for as many as the words have room for.
    """
    *lead, w = packed.shape
    whole = np.pad(np.ascontiguousarray(packed, "<i4"), [(0, 0)] * len(lead) + [(0, -w % bits)])
    stream = whole.view(np.uint8).reshape(*lead, -1, bits)
    found = np.zeros((*stream.shape[:-1], TOGETHER), np.uint8)
    for byte, code, shift in overlaps(bits):
        found[..., code] |= stream[..., byte] >> shift if shift >= 0 else stream[..., byte] << -shift
    return (found & (2**bits - 1)).reshape(*lead, -1)[..., : w * WORD // bits if n is None else n]


def n_words(n: int, bits: int) -> int:
    """Words of `n` codes."""
    return -(-n * bits // WORD)


def overlaps(bits: int) -> Iterator[tuple[int, int, int]]:
    """(byte, code, the bit of the byte at which the code begins), of bytes and codes that share bits."""
    for byte in range(bits):
        for code in range(TOGETHER):
            shift = code * bits - 8 * byte
            if -bits < shift < 8:
                yield byte, code, shift

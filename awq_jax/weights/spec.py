"""How one weight is stored (QuantSpec), and which weights are stored otherwise (Rule)."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

WHOLE_COLUMN = -1


def is_whole(value: Any) -> bool:
    """Whether this is a whole number by its type; numpy's are."""
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class QuantSpec:
    """How one weight is stored: `w ~ (q - z) * s`, one step s and zero point z a group.

    Args:
      bits: width of the codes q, 2 to 8. Codes are 0 .. 2**bits - 1.
      group_size: input channels that share a step: a multiple of 32, or -1 for a whole column.
      symmetric: the zero point is 2**(bits - 1) everywhere and is not stored.

    Raises:
      ValueError: a value outside these ranges.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not is_whole(self.bits) or self.bits not in range(2, 9):
            raise ValueError(
                f"bits={self.bits!r}: give a whole number of 2 to 8 (awq.with_average_bits makes 3.5, say, of sites of "
                "several widths)."
            )
        size = self.group_size
        if not is_whole(size) or (size != WHOLE_COLUMN and (size < 32 or size % 32)):
            raise ValueError(
                f"group_size={size!r}: use a multiple of 32 (32, 64, 128 are what kernels know), "
                f"or {WHOLE_COLUMN} for one group a column."
            )

    @property
    def levels(self) -> int:
        """The largest code, 2**bits - 1."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric weight, 2**(bits - 1)."""
        return 2 ** (self.bits - 1)

    def group(self, in_features: int) -> int:
        """Rows in a group of a weight with `in_features` rows; a whole column is padded to a multiple of 32."""
        return -(-in_features // 32) * 32 if self.group_size == WHOLE_COLUMN else self.group_size

    def padding(self, in_features: int) -> int:
        """Rows of zeros that complete the last group."""
        return -in_features % self.group(in_features)


@dataclass(frozen=True)
class Rule:
    """Sites whose path matches `pattern` (`re.search`) are skipped or take the named fields of the spec."""

    pattern: str
    skip: bool = False
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as e:
            raise ValueError(f"rule {self.pattern!r} is not a regular expression: {e}") from e
        if self.skip and self.changes:
            raise ValueError(f"rule {self.pattern!r} both skips and changes {sorted(self.changes)}: choose one.")
        if not self.skip and not self.changes:
            raise ValueError(f"rule {self.pattern!r} changes nothing: give skip=True, bits, group_size or symmetric.")
        replace(QuantSpec(), **self.changes)

    @property
    def changes(self) -> dict[str, Any]:
        named = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        return {k: v for k, v in named.items() if v is not None}

"""What one way to lay codes out in memory consists of."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, UInt8

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Packing:
    """A way to lay out the codes of a weight; `PACKINGS` has all of them by name.

    Args:
      name: what `QuantizedTensor.packing` says.
      dtype: of what is stored.
      bits: widths of codes that it holds.
      together: rows that a shard of the weight holds all or none of.
      pack: codes (*lead, i, o), their bits and the rows of a group, of which all are whole, to what is stored.
      unpack: what is stored and the bits, to codes (*lead, rows, o); rows that pack has added are there.
      shape: (*lead, rows, o) of what `unpack` gives, from the shape of what is stored and the bits.
      refused: why the kernels for GPUs, which read tiles, do not run, and what to do.
    """

    name: str
    dtype: Any
    bits: Collection[int]
    together: int
    pack: Callable[[UInt8[Array, "*lead i o"], int, int], Array]
    unpack: Callable[[Array, int], UInt8[Array, "*lead rows o"]]
    shape: Callable[[Shape, int], Shape]
    refused: str = ""

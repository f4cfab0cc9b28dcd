"""A tensor that stays in its file until it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from awq_jax.weights.spec import QuantSpec


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is and how to get it.

    Args:
      shape: of what `read` gives.
      nbytes: what it takes in the file.
      stored_as: the type in the file: "bfloat16", "Q4_K", "4-bit g128".
      dtype: of what `read` gives.
      spec: `read` gives a QuantizedTensor of it, [in, out] where an array would be [out, in].
      codes: of a tensor that a codec reads: its codes, as they are in the file.
      coded: how these are stored.
      picked: rows of it are picked, as an embedding's: it is read dense.
      read: the tensor, mapped from the file or converted from it: a numpy array or a QuantizedTensor of them. Each
        call reads anew.
    """

    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], Any]
    stored_as: str = ""
    dtype: Any = np.float32
    spec: QuantSpec | None = None
    codes: Callable[[], Any] | None = None
    coded: QuantSpec | None = None
    picked: bool = False

    @property
    def quantized(self) -> bool:
        return self.spec is not None

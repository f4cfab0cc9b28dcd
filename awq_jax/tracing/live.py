"""What goes from segment to segment, of every batch: in memory up to a budget, beyond it in files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.memory import nbytes_of
from awq_jax.tracing.flat import Value


@dataclass
class Live:
    """The live values of one batch.

    Args:
      share: bytes of them that memory may hold; what is more goes to files without a name, which the system reads and
        drops as it needs memory.
      most: the largest number of bytes that they had.
    """

    share: float
    arrays: dict[Value, Any] = field(default_factory=dict)
    most: int = 0

    def put(self, values: Sequence[Value], arrays: Sequence[Any]) -> None:
        for v, a in zip(values, arrays, strict=True):
            self.arrays[v] = self.kept(a)
        self.most = max(self.most, nbytes_of(self.arrays.values()))

    def get(self, values: Sequence[Value]) -> list[Any]:
        return [v.known if v.known is not None else self.arrays[v] for v in values]

    def keep(self, values: Iterable[Value]) -> None:
        """Drop all others."""
        wanted = set(values)
        self.arrays = {v: a for v, a in self.arrays.items() if v in wanted}

    def kept(self, a: Any) -> Any:
        if jnp.issubdtype(jnp.result_type(a), jax.dtypes.extended):
            return a
        a = np.asarray(a)
        in_memory = nbytes_of(b for b in self.arrays.values() if not isinstance(b, np.memmap))
        return a if in_memory + a.nbytes <= self.share or not a.size else in_file(a)


def in_file(a: np.ndarray) -> np.memmap:
    with tempfile.TemporaryFile() as file:
        file.truncate(a.nbytes)
        mapped = np.memmap(file, a.dtype, "r+", shape=a.shape)
    mapped[...] = a
    mapped.flush()
    return mapped

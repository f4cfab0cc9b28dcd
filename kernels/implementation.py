"""What an implementation of a matmul consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from awq_jax.kernels.tilings.table import Case, Tiling

Refuses = Callable[..., str | None]
Matmul = Callable[..., Any]


@dataclass(frozen=True)
class Implementation:
    """A way to multiply with a packed weight: a matmul, and what is to be known before it is called.

    A tiling that may be given is None for the implementation's own.

    Args:
      name: what it is asked for by.
      refuses: of x, w and perhaps a tiling: why it cannot run this case, None if it can.
      matmul: `x @ w` of x and w and, as keywords, the dtype of the result and perhaps a tiling; raises
        NotImplementedError with what `refuses` says.
      kernels: those of the table whose tilings it runs.
      worth_timing: of a tiling of one of these kernels and a case: whether it may be the fastest.
      described: of x, w and a tiling: what runs, in words.
      is_custom_call: it is a kernel for CUDA of which XLA knows nothing, how to cut it among devices neither.
    """

    name: str
    refuses: Refuses
    matmul: Matmul
    kernels: tuple[str, ...] = ()
    worth_timing: Callable[[Tiling, Case], bool] = lambda tiling, case: False
    described: Callable[[Any, Any, Tiling | None], str] = lambda x, w, tiling: ""
    is_custom_call: bool = False

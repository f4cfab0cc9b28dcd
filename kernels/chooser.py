"""Which implementation multiplies: the first that does not refuse the case.

An implementation is an entry of `IMPLEMENTATIONS`, where it is asked for by name, and of `TRIED` if it is tried where
none is asked for. Those for GPUs are tried as one, since the table says which of their kernels is the fastest.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
from jaxtyping import Array, Float

from awq_jax.kernels.contract import PackedWeight, sizes
from awq_jax.kernels.gpu import TENSOR_CORES, architecture
from awq_jax.kernels.implementation import Implementation
from awq_jax.kernels.mosaic.matmul import MOSAIC
from awq_jax.kernels.tilings import table
from awq_jax.kernels.tilings.table import Tiling
from awq_jax.kernels.triton import matmul as triton
from awq_jax.kernels.xla import dense
from awq_jax.kernels.xla.int4 import DIRECT

IMPLEMENTATIONS = (triton.TRITON, DIRECT, dense.XLA, MOSAIC)
GROUPED = (triton.GROUPED, dense.GROUPED)
"""The same of sorted rows."""


def runner(kernel: str) -> Implementation:
    """The implementation that runs the tilings of a kernel of the table."""
    return next(i for i in IMPLEMENTATIONS if kernel in i.kernels)


def found(x: Any, w: PackedWeight, tiling: Tiling | None) -> tuple[Implementation, Tiling | None]:
    """A tiling, or the table's for this case, and who runs it: Triton what needs none, or has none."""
    experts, rows, k, n = sizes(x, w)
    if tiling is None and 0 not in (experts, rows, k, n):
        tiling = table.tiling(architecture() or TENSOR_CORES, x.dtype.name, w.spec.group(k), rows, k, n)
    return (runner(tiling.kernel) if tiling else triton.TRITON), tiling


def refuses(x: Any, w: PackedWeight, tiling: Tiling | None = None) -> str | None:
    """Why no kernel for GPUs reads w, or what the table names cannot run."""
    if reason := triton.unread(x.dtype, w):
        return reason
    implementation, tiling = found(x, w, tiling)
    return implementation.refuses(x, w, tiling)


def matmul(
    x: Float[Array, "*b i"], w: PackedWeight, *, dtype: Any = None, tiling: Tiling | None = None
) -> Float[Array, "*b o"]:
    """`x @ w` by the kernel that the table names for so many rows, or with the tiling given."""
    implementation, tiling = found(x, w, tiling)
    return implementation.matmul(x, w, dtype=dtype, tiling=tiling)


def described(x: Any, w: PackedWeight, tiling: Tiling | None) -> str:
    """Which kernel that is, in words."""
    implementation, tiling = found(x, w, tiling)
    return implementation.described(x, w, tiling)


TABLED = Implementation("triton", refuses, matmul, described=described, is_custom_call=True)
TRIED = (TABLED, DIRECT, dense.XLA)


def choose(implementations: Sequence[Implementation], *case: Any) -> Implementation:
    """The first that does not refuse; on a GPU a note says what those before it lack.

    Raises:
      NotImplementedError: all refuse; the message has all reasons.
    """
    reasons: list[str] = []
    for implementation in implementations:
        reason = implementation.refuses(*case)
        if reason is None:
            if reasons and jax.default_backend() == "gpu":
                tell(f"int4 matmul runs as plain XLA, slower than it could. {'; '.join(reasons)}.")
            return implementation
        reasons.append(f"{implementation.name}: {reason}")
    raise NotImplementedError("No implementation runs this int4 matmul. " + "; ".join(reasons))


def named(implementations: Sequence[Implementation], name: str, *case: Any) -> Implementation:
    """The one of a name.

    Raises:
      ValueError: there is none.
      NotImplementedError: it refuses; the message says why.
    """
    by_name = {implementation.name: implementation for implementation in implementations}
    if name not in by_name:
        raise ValueError(f"implementation={name!r}: choose one of {sorted(by_name)} or None.")
    if reason := by_name[name].refuses(*case):
        raise NotImplementedError(reason)
    return by_name[name]


@cache
def tell(message: str) -> None:
    """Warns, once for each message."""
    warnings.warn(message, stacklevel=4)

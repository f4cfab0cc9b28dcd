"""A weight as every format's arrays and a QuantizedTensor have it: codes, steps, zero points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8

import awq_jax.kernels as kernels
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import QuantizedTensor, in_rows


@dataclass(frozen=True)
class Codes:
    """A weight of shape (*lead, i, o): `w = (q - zero) * scale`, row r in group `r // (i / groups)` or `group_of[r]`.

    Args:
      spec: bits and groups, and whether it is declared symmetric.
      scale: in the dtype that the file has.
      zero: uint8; float32 in formats that store -zero * scale, where that is none of a whole number.
      group_of: None where groups follow each other.
    """

    q: UInt8[np.ndarray, "*lead i o"]
    scale: Float[np.ndarray, "*lead groups o"]
    zero: UInt8[np.ndarray, "*lead groups o"] | Float[np.ndarray, "*lead groups o"]
    spec: QuantSpec
    group_of: Int[np.ndarray, " i"] | None = None

    @property
    def whole(self) -> bool:
        """Whether zero points are whole numbers, as a code is."""
        return self.zero.dtype == np.uint8

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle code."""
        return self.whole and bool((self.zero == self.spec.middle).all())

    def differs(self, other: Codes) -> str | None:
        """What of two weights differs, None if they are equal."""
        for name in ("q", "scale", "zero", "group_of"):
            a, b = getattr(self, name), getattr(other, name)
            if (a is None) != (b is None) or (a is not None and not np.array_equal(a, b)):
                return name
        return None

    def dense(self) -> Float[np.ndarray, "*lead i o"]:
        """The weight in float32."""
        *_, i, _ = self.q.shape
        rows = np.arange(i) // (i // self.scale.shape[-2]) if self.group_of is None else self.group_of
        of_rows = lambda a: a.astype(np.float32)[..., rows, :]
        return (self.q - of_rows(self.zero)) * of_rows(self.scale)


def whole_or_float(
    zero: Float[np.ndarray, "*g"],
    levels: int,
    stored: Float[np.ndarray, "*g"],
    store: Callable[[np.ndarray], np.ndarray],
) -> UInt8[np.ndarray, "*g"] | Float[np.ndarray, "*g"]:
    """Zero points that a format stores as another number: uint8 if rounded ones give back all that is `stored`.

    Args:
      zero: float32, as computed from what is stored.
      levels: the largest code.
      store: what is stored of zero points.

    Raises:
      ValueError: no zero point gives what is stored.
    """
    nearest = np.clip(np.round(zero), 0, levels)
    if np.array_equal(store(nearest), stored):
        return nearest.astype(np.uint8)
    if not np.allclose(store(zero).astype(np.float32), stored.astype(np.float32), rtol=1e-6, atol=0):
        raise ValueError("steps of 0, or numbers that are not finite, give the zero points no value")
    return zero


def apart(rows: Int[np.ndarray, " i"] | None, i: int, groups: int) -> Int[np.ndarray, " i"] | None:
    """The group of each row as a file says it, None where groups follow each other.

    Raises:
      ValueError: groups that there are not, or another number of rows.
    """
    if rows is None or np.array_equal(rows, np.arange(i) // (i // groups)):
        return None
    if rows.shape != (i,) or rows.min() < 0 or rows.max() >= groups:
        raise ValueError(f"rows are in groups {rows.min()} to {rows.max()}, there are {groups}")
    return rows


def codes_of(w: QuantizedTensor) -> Codes:
    """The codes of a quantized weight, without its padding."""
    rows = kernels.unpack(jnp.asarray(in_rows(w).codes), w.spec.bits)
    scale = np.asarray(w.scales)
    zero = np.full(scale.shape, w.spec.middle, np.uint8) if w.zeros is None else np.asarray(w.zeros)
    return Codes(np.asarray(rows)[..., : w.in_features, :], scale, zero, w.spec)


def tensor_of(w: Codes, dtype: Any) -> QuantizedTensor | Shaped[np.ndarray, "*lead o i"]:
    """The weight with numpy leaves; dense, as [out, in], where rows of a group lie apart.

    Args:
      dtype: that the dense weight has.
    """
    if w.group_of is not None:
        return np.ascontiguousarray(w.dense().astype(dtype).swapaxes(-1, -2))
    *lead, i, _ = w.q.shape
    pad = w.spec.padding(i)
    # Whatever is declared, zero points that are stored count.
    symmetric = w.spec.symmetric and w.symmetric
    rows = np.pad(w.q, [*[(0, 0)] * len(lead), (0, pad), (0, 0)])
    return QuantizedTensor(
        codes=np.asarray(kernels.pack(jnp.asarray(rows), w.spec.bits)),  # pyright: ignore[reportArgumentType]
        scales=np.asarray(w.scale),  # pyright: ignore[reportArgumentType]
        zeros=None if symmetric else w.zero,  # pyright: ignore[reportArgumentType]
        input_scale=None,
        spec=replace(w.spec, symmetric=symmetric),
        dtype=np.dtype(dtype),
        pad=pad,
    )

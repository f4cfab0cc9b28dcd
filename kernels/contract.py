"""What a kernel reads of a weight, and what it refuses in words.

A case that an implementation cannot run it refuses with the reason, see implementation.py; one that nobody could run is
the caller's mistake and a ValueError.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float

from awq_jax.kernels.packing import PACKINGS, TILES


class PackedWeight(Protocol):
    """What a kernel reads of a quantized weight of logical shape (*lead, i, o).

    codes: as the entry of `packing` in packing/ says. scales: float (*lead, groups, o); zeros: uint8 like scales, or
    None where the zero point is `spec.middle`; input_scale: float (*lead, i), multiplied into x, or None. The last
    `pad` rows of the codes are padding.
    """

    @property
    def codes(self) -> Any: ...

    @property
    def scales(self) -> Any: ...

    @property
    def zeros(self) -> Any: ...

    @property
    def input_scale(self) -> Any: ...

    @property
    def pad(self) -> Any: ...

    @property
    def spec(self) -> Any: ...

    @property
    def packing(self) -> Any: ...

    @property
    def in_features(self) -> Any: ...


def sizes(x: Float[Array, "*b i"], w: PackedWeight) -> tuple[int, int, int, int]:
    """How many matrices w has, rows of x each is multiplied with, its input and its output features."""
    lead = w.scales.shape[:-2]
    return math.prod(lead), math.prod(x.shape[len(lead) : -1]), w.in_features, w.scales.shape[-1]


def not_in_tiles(w: PackedWeight) -> str | None:
    """Why the kernels for GPUs do not read w; None if it is packed for them."""
    if w.spec.bits != 4:
        return f"{w.spec.bits}-bit codes: the kernels read 4 bits"
    return None if w.packing == TILES.name else PACKINGS[w.packing].refused


def check_shapes(x: Float[Array, "*b i"], w: PackedWeight, *, grouped: bool = False) -> None:
    """Raises ValueError unless x is of floats, has the weight's features and, if not `grouped`, its leading axes; and
    unless codes are stored as their packing says, and scales, zeros and input scale have their shape.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}: cast it to float32, bfloat16 or float16.")
    packing = PACKINGS.get(w.packing)
    if packing is None or w.codes.dtype != packing.dtype:
        expected = packing.dtype if packing else "nothing"
        raise ValueError(
            f"codes are {w.codes.dtype}, packed in {w.packing!r} they are {expected}. "
            "Cast a weight's scales if you must, never all of its leaves."
        )
    if x.shape[-1] != w.in_features:
        raise ValueError(
            f"x has {x.shape[-1]} features in its last axis, the weight takes {w.in_features}. "
            "Move the contracted axis of x to the end."
        )
    *leading, _, outs = packing.shape(w.codes.shape, w.spec.bits)
    lead, i = tuple(leading), w.in_features
    if not grouped and x.shape[: len(lead)] != lead:
        raise ValueError(
            f"x has shape {x.shape}, the weight {(*lead, i, w.scales.shape[-1])}: the weight's leading axes {lead} "
            "must lead x too. Broadcast x, or jax.vmap over the weight."
        )
    if grouped and (x.ndim != 2 or len(lead) != 1):
        raise ValueError(
            f"x has shape {x.shape}, the weight {(*lead, i, w.scales.shape[-1])}: sorted rows are (rows, i), experts "
            "(e, i, o). Reshape them."
        )
    expected = (*lead, -(-i // w.spec.group(i)), outs)
    for name, found, shape in (
        ("scales", w.scales, expected),
        ("zeros", w.zeros, expected),
        ("input_scale", w.input_scale, (*lead, i)),
    ):
        if found is not None and tuple(found.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(found.shape)}, the codes of {i} input features in groups of "
                f"{w.spec.group(i)} need {shape}. Slice or stack all leaves of a weight alike."
            )

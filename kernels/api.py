"""`int4_matmul`: picks the implementation that can run a case."""

from __future__ import annotations

from typing import Any, Protocol

from jaxtyping import Array, Float, Int

from awq_jax.kernels import reference


class PackedWeight(Protocol):
    """What a kernel reads of a quantized weight of logical shape (*lead, i, o).

    codes: uint32 (*lead, w, o), see packing.py; scales: float (*lead, groups, o); zeros: uint8 like scales, or
    None where the zero point is `spec.middle`; input_scale: float (*lead, i), multiplied into x, or None.
    The last `pad` rows of the codes are padding.
    """

    codes: Any
    scales: Any
    zeros: Any
    input_scale: Any
    pad: Any
    spec: Any
    in_features: Any


IMPLEMENTATIONS = {"xla": reference.matmul}


def int4_matmul(x: Float[Array, "*b i"], w: PackedWeight, *, implementation: str | None = None) -> Float[Array, "*b o"]:
    """`x @ w.dequantize()` without keeping the dense weight; accumulates in float32, returns x's dtype.

    Args:
      x: float16, bfloat16 or float32 activations; leading axes of w, if any, are leading axes of x too.
      w: packed weight of logical shape (*lead, i, o), 2 to 8 bits; its input scale is applied to x.
      implementation: "xla"; None takes the first that supports the case.

    Raises:
      ValueError: the last axis of x is not w's input axis, or there is no such implementation.
    """
    check_features(x, w)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: choose one of {sorted(IMPLEMENTATIONS)} or None.")
    return IMPLEMENTATIONS[implementation or "xla"](x, w)


def grouped_int4_matmul(x: Float[Array, "m i"], w: PackedWeight, group_sizes: Int[Array, " e"]) -> Float[Array, "m o"]:
    """Sorted rows, each times the matrix of its group (expert), as jax.lax.ragged_dot; rows beyond all groups give 0.

    Args:
      x: float16, bfloat16 or float32; the first group_sizes[0] rows belong to the first group, and so on.
      w: packed weight of logical shape (e, i, o), 2 to 8 bits.

    Raises:
      ValueError: the last axis of x is not w's input axis.
    """
    check_features(x, w)
    return reference.grouped_matmul(x, w, group_sizes)


def check_features(x: Float[Array, "*b i"], w: PackedWeight) -> None:
    if x.shape[-1] != w.in_features:
        raise ValueError(
            f"x has {x.shape[-1]} features in its last axis, the weight takes {w.in_features}. "
            "Move the contracted axis of x to the end."
        )

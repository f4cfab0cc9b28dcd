"""The one file that reads the params of jax's primitives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def is_grouped_by_rows(numbers: Any) -> bool:
    """Whether a ragged_dot_general is `lax.ragged_dot`: sorted rows (m, k), each times its group's matrix."""
    (cx, cw), batch = numbers.dot_dimension_numbers
    of_rows = (tuple(cx), tuple(numbers.lhs_ragged_dimensions)) == ((1,), (0,))
    return of_rows and len(cw) == len(numbers.rhs_group_dimensions) == 1 and not any(batch)


def is_pointwise(p: Mapping[str, Any], kernel: Sequence[int]) -> bool:
    """Whether a conv_general_dilated with these params is a matmul at every place: 1 x 1, no padding, one group."""
    spatial = [kernel[k] for k in p["dimension_numbers"].rhs_spec[2:]]
    spread = any(n != 1 for n in (*spatial, *p["lhs_dilation"], p["feature_group_count"], p["batch_group_count"]))
    return not spread and not any(n for pads in p["padding"] for n in pads)


def pointwise_slices(p: Mapping[str, Any]) -> tuple[slice, ...]:
    """Which places of the input such a convolution reads."""
    spatial = dict(zip(p["dimension_numbers"].lhs_spec[2:], p["window_strides"], strict=True))
    return tuple(slice(None, None, spatial.get(k, 1)) for k in range(len(spatial) + 2))

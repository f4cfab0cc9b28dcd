"""Numbers in float16, which most files of servers use, where it holds them."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float16

from awq_jax.errors import InputError


def as_float16(
    name: str, w: Float[np.ndarray, "*shape"], title: str, axis: int | None = None
) -> Float16[np.ndarray, "*shape"]:
    """`w` in float16.

    Args:
      name: for the errors, as is `title`, the format.
      axis: along which values are held against their largest; None for all, beside which a token that was never
        trained is nothing.

    Raises:
      InputError: a value that float16 cannot hold, or so small values that it would hold little of them.
    """
    if w.dtype == np.float16:
        return w
    with np.errstate(over="ignore"):
        half = w.astype(np.float16)
    if not np.isfinite(half).all():
        largest = float(np.abs(w.astype(np.float32)).max())
        raise InputError(
            f"{name}: a value of {largest:g} does not fit float16, which {title} files use (up to 65504): write "
            "format='orbax'."
        )
    wide = np.asarray(w, np.float32)
    largest, lost = (np.abs(a).max(axis, initial=0) for a in (wide, half - wide))
    if (odd := lost > 2**-7 * largest).any():
        raise InputError(
            f"{name}: values of at most {largest[odd].max():g} are too small for float16, which {title} files use "
            "(exact from 6e-5): write format='orbax'."
        )
    return half

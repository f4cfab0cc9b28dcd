"""Matmuls of sorted tokens with the weights of their experts."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from awq_jax.torch_bridge.operations.table import operation


@operation("_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_mm(a: Array, b: Array, offs: Array | None = None, bias: Any = None, out_dtype: Any = None) -> Array:
    """Rows of a (t, i), up to offs[e] those of expert e, with b (e, i, o)."""
    if a.ndim != 2 or b.ndim != 3 or offs is None or bias is not None:
        raise NotImplementedError(f"groups of {a.ndim} and {b.ndim} axes, or with a bias")
    sizes = jnp.diff(offs, prepend=jnp.zeros(1, offs.dtype)).astype(jnp.int32)
    return lax.ragged_dot(a, b, sizes)

"""Refuses what is NaN or infinite, and says where it comes from: params, a batch, or what a function makes of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from awq_jax.errors import InputError
from awq_jax.search.moments import Moments
from awq_jax.weights.paths import named_leaves
from awq_jax.weights.tensor import is_quantized

Flags = dict[str, Bool[Array, ""]]


def require_finite_weights(params: Any, prefix: str = "") -> None:
    """Refuse dense params that are NaN or infinite; names the first, after `prefix`."""
    for name, leaf in named_leaves(params).items():
        if is_quantized(leaf) or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            continue
        good = np.isfinite(np.asarray(leaf))
        if not good.all():
            found = f"{good.size - int(good.sum())} of {good.size} weights are NaN or infinite"
            raise InputError(f"{prefix}{name}: {found}. Repair the model.")


def finite(inputs: tuple[Any, ...], mask: Any, moments: Mapping[str, Moments]) -> tuple[Flags, Flags]:
    """Which arrays of a batch are finite, by their place in it, and which groups' moments."""
    given = {f"input {name}": x for name, x in named_leaves(inputs).items()}
    given |= {} if mask is None else {"the mask": mask}
    floats = {name: x for name, x in given.items() if jnp.issubdtype(jnp.result_type(x), jnp.inexact)}
    seen = {name: m.abs_sum + m.diagonal for name, m in moments.items()}
    flags = lambda arrays: {name: jnp.isfinite(a).all() for name, a in arrays.items()}
    return flags(floats), flags(seen)


def require_finite(k: int, flags: tuple[Flags, Flags], params: Any) -> None:
    """Refuse batch number k where something in it is not finite, or else what some site reads."""
    given, seen = ([name for name, good in found.items() if not good] for found in jax.device_get(flags))
    if given:
        raise ValueError(f"Batch {k + 1}: {given[0]} holds NaN or infinite values: mend the batch, or leave it out.")
    if seen:
        require_finite_weights(params)
        raise ValueError(
            f"Batch {k + 1}: what is multiplied with {seen[0]} is NaN, infinite or beyond 1e12, though the batch and "
            "the params are not: let the function compute in bfloat16 or float32, or leave the batch out."
        )

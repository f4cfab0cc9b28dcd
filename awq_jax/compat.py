"""The one file that knows jax versions, and what other packages do that strict settings of jax refuse."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import optax

REMAT = ("remat2", "remat", "checkpoint")
CALLS = ("pjit", "jit", "closed_call", "core_call", *REMAT, "custom_jvp_call", "custom_vjp_call")
"""What runs the jaxpr that it holds, by the names of all versions."""

COPIES = ("copy", "copy_p")


def scan_split(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan equation's operands are constants, and how many are carried.

    jax 0.11 replaced `num_consts` and `num_carry` by the flat tree `ft_in` of (consts, carry, xs).
    """
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def varying(x: Any) -> frozenset[str]:
    """The mesh axes along which x differs, inside a shard_map that keeps track of them.

    jax 0.10.2 replaced `vma` by `mat.varying`.
    """
    of = jax.typeof(x)
    return of.mat.varying if hasattr(of, "mat") else of.vma


def vary(x: Any, axes: Iterable[str]) -> Any:
    """`x`, said to differ along these mesh axes too."""
    more = tuple(set(axes) - varying(x))
    return jax.lax.pcast(x, more, to="varying") if more else x


def adam(rate: optax.ScalarOrSchedule, **options: Any) -> optax.GradientTransformation:
    """`optax.adam`; its power of a float and an integer is promoted also where jax is told to promote nothing."""
    loose = jax.numpy_dtype_promotion("standard")
    optimizer = optax.adam(rate, **options)
    return optax.GradientTransformation(optimizer.init, loose(optimizer.update))

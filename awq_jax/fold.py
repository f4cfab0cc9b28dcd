"""Puts the scales of a fold into the params around it, and proves that the function stayed what it was."""

from __future__ import annotations

import functools as ft
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from awq_jax.sites import Fold, named_leaves
from awq_jax.tensor import stack_places


def fold(params: Any, factors: Mapping[int, Float[Array, "*stack n"]], folds: tuple[Fold, ...]) -> Any:
    """`params` with every member of the folds scaled: consumers multiplied, absorbers divided.

    Args:
      factors: by the fold's index, one positive factor a channel, with the layers' axis in front when stacked.
    """
    leaves = named_leaves(params)
    scaled = dict(leaves)
    for k, s in factors.items():
        for m in folds[k].members:
            w = scaled[m.param]
            options = {"axes": m.axes, "stack": m.stack, "inverse": m.inverse, "offset": m.offset}
            scaled[m.param] = _scaled(w, s, m.channels, **options)
    return jax.tree.unflatten(jax.tree.structure(params), [scaled[name] for name in leaves])


@jax.jit
def by_channel(factors: Float[Array, "*stack n"], channels: Int[Array, " c"]) -> Float[Array, "*stack c"]:
    """The factor of each channel, 1 where its number is -1."""
    return jnp.concatenate([factors, jnp.ones((*factors.shape[:-1], 1))], -1)[..., channels]


@ft.partial(jax.jit, static_argnames=("axes", "stack", "inverse", "offset"))
def _scaled(
    w: Array, s: Array, channels: Array, *, axes: tuple[int, ...], stack: tuple[int, ...], inverse: bool, offset: float
) -> Array:
    layers = stack_places(stack)
    order = [*layers, *(k for k in range(w.ndim) if k not in layers)]
    shape = [w.shape[k] if k in axes or k in layers else 1 for k in order]
    factor = by_channel(s, channels).reshape(shape).transpose([order.index(k) for k in range(w.ndim)])
    wide = jnp.asarray(w, jnp.float32) + offset
    return ((wide / factor if inverse else wide * factor) - offset).astype(w.dtype)


def check_fold(fn: Callable[..., Any], params: Any, folded: Any, *inputs: Any, tolerance: float | None = None) -> float:
    """The largest change of fn's outputs, relative to their largest value, that folding made.

    Raises:
      ValueError: it is more than rounding explains.
    """
    run = jax.jit(fn)
    worst = 0.0
    for before, after in zip(jax.tree.leaves(run(params, *inputs)), jax.tree.leaves(run(folded, *inputs)), strict=True):
        if not jnp.issubdtype(before.dtype, jnp.inexact):
            continue
        allowed = tolerance or rounding(params, before)
        before, after = (np.asarray(a, np.float32) for a in (before, after))
        change = float(np.abs(after - before).max() / max(np.abs(before).max(), 1e-30))
        worst = max(worst, change)
        if not change <= allowed:
            raise ValueError(
                f"Folding the scales changed the function by {change:.1e} of its largest output, more than rounding "
                f"explains ({allowed:.0e}). Nothing was written. Use an unfolded format (--format orbax), and please "
                "report the model: a consumer of a scaled tensor was missed."
            )
    return worst


def rounding(params: Any, output: Array) -> float:
    """How much of the largest output rounding may change, by the coarsest dtype of the params and the output."""
    dtypes = [jnp.result_type(leaf) for leaf in (*jax.tree.leaves(params), output)]
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact))
    return (300 if eps < 1e-6 else 16) * eps

"""What a fold does to params, in numpy."""

from __future__ import annotations

import jax
import numpy as np

from awq_jax.weights.paths import named_leaves


def rescaled(leaf, member, factors):
    """`leaf` after its part in a fold, in numpy; `factors` (n,), or (layers, n) for stacked params."""
    stack = leaf.shape[:1] if factors.ndim > 1 else ()
    scale = np.concatenate([factors, np.ones((*stack, 1), np.float32)], -1)[..., member.channels]
    scale = scale.reshape(*stack, *(n if k in member.axes else 1 for k, n in enumerate(leaf.shape) if k >= len(stack)))
    wide = np.asarray(leaf, np.float32) + member.offset
    return ((wide / scale if member.inverse else wide * scale) - member.offset).astype(leaf.dtype)


def random_factors(fold, traced, params, rng):
    """Powers of two, which bfloat16 params take without rounding."""
    site = traced.sites[fold.sites[0]]
    layers = named_leaves(params)[site.name].shape[: site.stacked]
    return np.float32(2.0) ** rng.integers(-3, 4, size=(*layers, fold.n))


def gauged(params, changes):
    """`params` with `changes`, pairs of a member and the factors of its fold."""
    leaves = named_leaves(params)
    for member, factors in changes:
        leaves[member.param] = rescaled(leaves[member.param], member, factors)
    return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))

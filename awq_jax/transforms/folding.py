"""Puts the scales of a fold into the params around it, and proves that the function stays what it was."""

from __future__ import annotations

import functools as ft
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from awq_jax.tracing.sites import Fold
from awq_jax.weights.layout import stack_places
from awq_jax.weights.paths import named_leaves


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
    return jnp.concatenate([factors, jnp.ones((*factors.shape[:-1], 1), factors.dtype)], -1)[..., channels]


@ft.partial(jax.jit, static_argnames=("axes", "stack", "inverse", "offset"))
def _scaled(
    w: Array, s: Array, channels: Array, *, axes: tuple[int, ...], stack: tuple[int, ...], inverse: bool, offset: float
) -> Array:
    layers = stack_places(stack)
    order = [*layers, *(k for k in range(w.ndim) if k not in layers)]
    shape = [w.shape[k] if k in axes or k in layers else 1 for k in order]
    factor = by_channel(s, channels).reshape(shape).transpose([order.index(k) for k in range(w.ndim)])
    wide = jnp.asarray(w, np.result_type(w.dtype, np.float32)) + offset
    factor = factor.astype(wide.dtype)
    return ((wide / factor if inverse else wide * factor) - offset).astype(w.dtype)


def check_folds(fn: Callable[..., Any], params: Any, folds: tuple[Fold, ...], *inputs: Any) -> None:
    """Refuse folds that change the function.

    Each is tried with factors 2, 4 and 8, which round nothing, so that half precision hides nothing either, and make
    activations smaller. Outputs that are integers are not compared; what is NaN or infinite must stay so.

    Raises:
      ValueError: a fold changes an output; names its sites. Outputs that are all integers.
    """
    run = jax.jit(fn)
    before = run(params, *inputs)
    if not any(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(before)):
        raise ValueError("The function returns integers alone, which show no fold that is wrong: let it return logits.")

    leaves = named_leaves(params)

    def change(tried: tuple[Fold, ...]) -> float:
        rng = np.random.default_rng(0)
        factors = {k: _powers_of_two(f, leaves, rng) for k, f in enumerate(tried)}
        return largest_change(before, run(fold(params, factors, tried), *inputs))

    allowed = _rounding(before, leaves, folds)
    if change(folds) <= allowed:
        return
    for f in folds:
        if not (found := change((f,))) <= allowed:
            raise ValueError(
                f"{', '.join(f.sites)}: folding a scale of their input into the op before changed the function by "
                f"{found:.1e} of its largest output, more than rounding explains ({allowed:.0e}). Nothing was rounded. "
                "Quantize with scales='beside', and please report the model: what else reads that input "
                "was missed."
            )
    raise ValueError(
        f"The folds of {', '.join(name for f in folds for name in f.sites)} change the function together, though none "
        "does alone. Quantize with scales='beside', and please report the model."
    )


def largest_change(before: Any, after: Any) -> float:
    """The largest change of any array, relative to its largest finite value; NaN where other places are not finite."""
    worst = [0.0]
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            continue
        a, b = (np.asarray(x, np.result_type(x.dtype, np.float32)) for x in (a, b))
        finite = np.isfinite(a)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return float("nan")
        a, b = a[finite], b[finite]
        change, largest = (float(np.abs(x).max(initial=0)) for x in (b - a, a))
        worst.append(change / largest if largest else np.inf if change else 0.0)
    return float(np.max(worst))


def _powers_of_two(f: Fold, leaves: Mapping[str, Any], rng: np.random.Generator) -> Float[Array, "*stack n"]:
    member = f.members[0]
    shape = np.shape(leaves[member.param])
    layers = [shape[k] for k in stack_places(member.stack)]
    return jnp.exp2(jnp.asarray(rng.integers(1, 4, (*layers, f.n)), jnp.float32))


def _rounding(outputs: Any, leaves: Mapping[str, Any], folds: tuple[Fold, ...]) -> float:
    """How much of the largest output rounding may change: that of the outputs, and of params that hold w of 1 + w."""
    rounded = [leaves[m.param] for f in folds for m in f.members if m.offset]
    dtypes = [jnp.result_type(leaf) for leaf in (*rounded, *jax.tree.leaves(outputs))]
    eps = max((float(jnp.finfo(dtype).eps) for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)), default=0)
    return (300 if eps < 1e-6 else 16) * eps

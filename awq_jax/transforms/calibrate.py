"""`with_moments`, `calibrate` and `quantized`: transforms of a pure function `fn(params, *inputs)`."""

from __future__ import annotations

import functools as ft
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from awq_jax.kernels import in_one_launch
from awq_jax.search import moments as mo
from awq_jax.search.moments import Moments
from awq_jax.tracing.interpret import RULES, Products, Records, Weight, evaluate, merge
from awq_jax.tracing.interpret_shard_map import all_gather, shard_map
from awq_jax.tracing.sites import Traced, abstract, sites, trace
from awq_jax.tracing.view import View
from awq_jax.transforms.finite import Flags, finite, require_finite
from awq_jax.weights.layout import stack_places
from awq_jax.weights.paths import named_leaves
from awq_jax.weights.tensor import as_floats, dot, is_quantized

Function = Callable[..., Any]
RULES |= {"shard_map": shard_map, "all_gather": all_gather}


@dataclass(frozen=True)
class Calibration:
    """What `quantize` needs to know of a function: its sites, the moments of their inputs, and one batch as a check.

    Args:
      moments: by the name of the first site of each group.
      example: the first batch; folds are tried on it. Empty where they were tried before.
    """

    fn: Function
    traced: Traced
    moments: dict[str, Moments] = field(repr=False)
    example: tuple[Any, ...] = field(repr=False)

    def of(self, site: str) -> Moments:
        return self.moments[self.traced.sites[site].group]


def _interpreted(
    fn: Function, params: Any, inputs: tuple[Any, ...], on_dots: Any, followed: Callable[[Any], bool]
) -> tuple[Any, Records]:
    """`fn(params, *inputs)`, and what `on_dots` records at the matmuls with the leaves that are `followed`."""
    closed, out_shape = trace(fn, abstract(params), inputs)
    weights = [
        Weight(name, leaf, View.of(leaf.shape), leaf.dtype) if followed(leaf) else leaf
        for name, leaf in named_leaves(params).items()
    ]
    outs, records = evaluate(closed, [*weights, *jax.tree.leaves(inputs)], on_dots)
    outs = [o.dense() if isinstance(o, Weight) else o for o in outs]
    return jax.tree.unflatten(jax.tree.structure(out_shape), outs), records


def quantized(fn: Function) -> Function:
    """`fn` that takes QuantizedTensors where it took dense params; every matmul with one goes through `dot`.

    Works under jit, vmap, scan and grad with respect to the inputs. Where a quantized param meets anything but
    rearrangements and a matmul it is made dense there. On one GPU few rows are multiplied with two or three weights in
    one launch, wherever the function reads the same input again.

    Keyword arguments go to `fn` as they are. A custom_vjp that a quantized param enters is differentiated as what it
    computes, its own rule is lost.

    Example:
      >>> logits = jax.jit(awq.quantized(model.apply))(qparams, tokens)
    """

    @ft.wraps(fn)
    def run(params: Any, *inputs: Any, **options: Any) -> Any:
        return _interpreted(ft.partial(fn, **options), params, inputs, _multiply, is_quantized)[0]

    return run


def _multiply(weights: Sequence[Weight], x: Array, sizes: Array | None, dtype: Any) -> Products:
    ys: dict[int, Array] = {}
    matrices = [weight.matrix for weight in weights]
    for alike in _alike(matrices):
        x_of = as_floats(x, weights[alike[0]].dtype)
        ys |= zip(alike, _product(x_of, [matrices[k] for k in alike], sizes, dtype), strict=True)
    return [ys[k] for k in range(len(weights))], {}


def _alike(matrices: Sequence[Any]) -> list[list[int]]:
    """Which go together: two or three quantized ones of a spec, four as two and two, so that none is left alone."""
    by_spec: dict[Any, list[int]] = {}
    for k, w in enumerate(matrices):
        by_spec.setdefault(w.spec if is_quantized(w) else k, []).append(k)
    out: list[list[int]] = []
    for left in by_spec.values():
        while left:
            n = 2 if len(left) == 4 else 3
            out, left = [*out, left[:n]], left[n:]
    return out


def _product(x: Array, matrices: Sequence[Any], sizes: Array | None, dtype: Any) -> Sequence[Array]:
    """x times matrices of one spec, in one launch if that can be."""
    if len(matrices) > 1 and dtype is None:
        try:
            return in_one_launch(x, *matrices)
        except NotImplementedError:
            pass
    return [dot(x, w if is_quantized(w) else w.astype(x.dtype), sizes, dtype=dtype) for w in matrices]


def with_moments(fn: Function, traced: Traced, *, block: int | None = mo.GRAM_BLOCK) -> Function:
    """`(params, *inputs, weights=None) -> (fn's output, moments by group)`, pure and jittable.

    Args:
      traced: `sites(fn, params, *inputs)`.
      block: largest size of the Gram matrix's diagonal blocks; None for the full matrix. Memory is i * block a group.

    `weights` is one weight a token, in the shape of the token axes of every site's input (a mask).
    """
    leaders = {site.group for site in traced.sites.values()}

    def run(params: Any, *inputs: Any, weights: Array | None = None) -> tuple[Any, dict[str, Moments]]:
        def on_dots(read: Sequence[Weight], x: Array, sizes: Array | None, dtype: Any) -> Products:
            # Else XLA computes what leads to x twice, for the matmul and for the moments.
            x = jax.lax.optimization_barrier(x)
            ys, _ = _multiply(read, x, sizes, dtype)
            kept = (weight for weight in read if weight.name in leaders)
            found = ({weight.key: _moments(weight, x, sizes, weights, block)} for weight in kept)
            return ys, ft.reduce(merge, found, {})

        out, found = _interpreted(fn, params, inputs, on_dots, lambda leaf: hasattr(leaf, "shape"))
        leaves = named_leaves(params)
        picked: dict[str, dict[Any, Moments]] = {}
        for (name, picks), m in found.items():
            picked.setdefault(name, {})[picks] = m
        return out, {name: _whole(ms, leaves[name].shape, traced.sites[name].stack) for name, ms in picked.items()}

    return run


def _moments(weight: Weight, x: Array, sizes: Array | None, weights: Array | None, block: int | None) -> Moments:
    """The moments of what a matmul with `weight` reads; `weights` is one a token."""
    x = weight.whole_input(x)
    if sizes is not None:
        if weights is not None:
            raise ValueError(f"{weight.name}: a mask cannot follow tokens that are sorted by expert: leave it out.")
        return mo.of_sorted(x, sizes, block)
    tokens = x.shape[weight.read.n_lead : -1]
    if weights is not None and jax.sharding.get_abstract_mesh().manual_axes:
        raise ValueError(f"{weight.name}: a mask does not reach tokens inside shard_map: leave it out.")
    if weights is not None and not _fit(weights.shape, tokens):
        raise ValueError(
            f"{weight.name}: weights have shape {weights.shape}, the site's tokens {tokens}. Give one weight a token."
        )
    return mo.of(x, block, weight.read.n_lead, weights)


def _fit(weights: tuple[int, ...], tokens: tuple[int, ...]) -> bool:
    """Whether weights of a shape are one a token; either may be flat."""
    return weights == tokens if len(weights) == len(tokens) else math.prod(weights) == math.prod(tokens)


def _whole(found: dict[Any, Moments], shape: tuple[int, ...], stack: tuple[int, ...]) -> Moments:
    """The moments of all layers, from those of layers picked one by one; a layer that was not has none."""
    at = max((j for picks in found for j, pick in enumerate(picks) if pick >= 0), default=None)
    if at is None:
        return ft.reduce(Moments.__add__, found.values())
    by_layer: dict[int, dict[Any, Moments]] = {}
    for picks, m in found.items():
        by_layer.setdefault(picks[at], {})[(*picks[:at], -1, *picks[at + 1 :])] = m
    parts = {k: _whole(ms, shape, stack) for k, ms in by_layer.items()}
    scanned = parts.pop(-1, None)
    none = jax.tree.map(jnp.zeros_like, next(iter(parts.values())))
    layers = [parts.get(k, none) for k in range(shape[stack_places(stack)[at]])]
    whole = jax.tree.map(lambda *ms: jnp.stack(ms, at), *layers)
    return whole if scanned is None else whole + scanned


def _moments_alone(
    observed: Function, params: Any, inputs: tuple[Any, ...], weights: Any
) -> tuple[dict[str, Moments], tuple[Flags, Flags]]:
    found = observed(params, *inputs, weights=weights)[1]
    return found, finite(inputs, weights, found)


def check_batch(k: int, batch: Any) -> None:
    """Refuse batch number k unless it is a tuple of inputs of which none is empty."""
    if not isinstance(batch, tuple | list):
        raise ValueError(f"A batch is a tuple of inputs, found {type(batch).__name__}: give [(tokens,)], say.")
    for name, x in named_leaves(tuple(batch)).items():
        if 0 in jnp.shape(x):
            raise ValueError(f"Batch {k + 1}: input {name} has shape {jnp.shape(x)}, no numbers: leave the batch out.")


def _why_none(traced: Traced) -> str:
    """The first params that are no sites, and why."""
    told = [f"{name or 'params'}: {why}" for name, why in traced.skipped.items()]
    return "; ".join(told[:4]) + ("; ..." if len(told) > 4 else "")


UNFIT = (TypeError, ValueError, LookupError)
"""What functions raise when they are called with inputs that they cannot take."""


def _sites_of_batch(fn: Function, params: Any, batch: tuple[Any, ...]) -> Traced:
    try:
        return sites(fn, params, *batch)
    except UNFIT as e:
        found = f"{type(e).__name__}: {e}"
        raise ValueError(f"Tracing the function with params and a batch of {len(batch)} inputs failed: {found}") from e


def calibrate(
    fn: Function,
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    *,
    block: int | None = mo.GRAM_BLOCK,
    mask: Callable[..., Array] | None = None,
) -> Calibration:
    """Statistics of every site's input over `batches`; what it keeps does not grow with the number of tokens.

    Args:
      fn: pure function of (params, *inputs).
      params: dense params pytree.
      batches: tuples of inputs. Each new shape compiles once.
      block: largest size of the Gram matrix's diagonal blocks; None for the full matrix.
      mask: `mask(*inputs)` gives one weight a token: 0 for padding or for what the model will not say.

    What a loop runs or a branch is taken counts as often as it ran; under vmap both branches of a cond run.

    Raises:
      ValueError: no batches; a batch without rows, or that the function cannot take; NaN or infinity in a batch, or
        in what a site reads; no site found; a mask that does not fit a site.
    """
    if block is not None and block < 1:
        raise ValueError(f"block={block}: give 1 or more, or None for whole Gram matrices.")
    total: dict[str, Moments] | None = None
    traced, example, step, unchecked = None, None, None, None
    for k, batch in enumerate(batches):
        check_batch(k, batch)
        if traced is None or step is None:
            traced, example = _sites_of_batch(fn, params, tuple(batch)), tuple(batch)
            if not traced.sites:
                raise ValueError(f"No matmul reads a param as a whole: nothing to quantize. {_why_none(traced)}")
            step = jax.jit(partial(_moments_alone, with_moments(fn, traced, block=block)))
        weights = mask(*batch) if mask else None
        try:
            new, flags = step(params, tuple(batch), weights)
        except UNFIT as e:
            shapes = [jnp.shape(x) for x in jax.tree.leaves(tuple(batch))]
            found = f"{type(e).__name__}: {e}"
            raise ValueError(f"Batch {k + 1}: the function cannot take inputs of shapes {shapes}: {found}") from e
        total = new if total is None else {name: total[name] + new[name] for name in total}
        # The one before: its flags are there while this one is computed.
        if unchecked:
            require_finite(*unchecked, params)
        unchecked = k, flags
    if traced is None or total is None or example is None or unchecked is None:
        raise ValueError("No calibration batch was given: pass an iterable of tuples of inputs.")
    require_finite(*unchecked, params)
    return Calibration(fn, traced, total, example)

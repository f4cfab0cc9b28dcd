"""`quantize(params, calibration, recipe)`: every site of a function, from dense params to QuantizedTensors."""

from __future__ import annotations

import functools as ft
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from threadpoolctl import threadpool_limits

from awq_jax.fold import check_fold, fold
from awq_jax.moments import Moments
from awq_jax.recipe import Recipe
from awq_jax.search.solve import find_scale, solve
from awq_jax.sites import Site, named_leaves
from awq_jax.spec import QuantSpec
from awq_jax.tensor import QuantizedTensor, assemble
from awq_jax.transform import Calibration


@dataclass(frozen=True)
class SiteReport:
    """What became of one site: output errors are relative to the output's energy, on the calibration's moments."""

    name: str
    spec: QuantSpec | None
    error: float
    nearest_error: float
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """Everything about one quantization that shapes alone decide."""

    specs: dict[str, QuantSpec]
    clips: dict[str, Callable[..., Any]]
    folds: tuple[int, ...]
    notes: dict[str, str]


def plan(calibration: Calibration, recipe: Recipe, prefix: str = "") -> Plan:
    """Which sites are quantized how, which folds are used, and why others are not; rules see `prefix + name`."""
    traced = calibration.traced
    specs = {name: spec for name in traced.sites if (spec := recipe.spec_of(prefix + name)) is not None}
    usable, notes = [], {}
    for k, candidate in enumerate(traced.folds):
        wanted = [name for name in candidate.sites if name in specs]
        if not recipe.fold or not wanted:
            continue
        if any(traced.sites[name].lead for name in candidate.sites):
            notes |= dict.fromkeys(wanted, "not folded: batched experts")
        elif len({specs[name] for name in wanted}) > 1:
            notes |= dict.fromkeys(wanted, "not folded: its sites have different specs")
        elif any(not np.array_equal(candidate.channels(n), candidate.channels(wanted[0])) for n in wanted):
            notes |= dict.fromkeys(wanted, "not folded: its sites read different channels")
        else:
            usable.append(k)
    if recipe.fold:
        refused = {n: f"not folded: {traced.sites[n].refused}" for n in specs if traced.sites[n].refused}
        notes = refused | notes
    clips = {name: recipe.clip_of(prefix + name) for name in specs}
    return Plan(specs, clips, tuple(usable), notes)


# jax's Cholesky on CPU is scipy's OpenBLAS, whose threads spin against XLA's: ten times slower than one thread.
@threadpool_limits.wrap(limits=1, user_api="blas")
def quantize(
    params: Any, calibration: Calibration, recipe: Recipe | None = None, *, prefix: str = ""
) -> tuple[Any, tuple[SiteReport, ...]]:
    """Params with a QuantizedTensor at every site, and a report of each site's error.

    Args:
      params: the dense params that were calibrated.
      calibration: from `calibrate`.
      recipe: None for 4 bits in groups of 128.
      prefix: path of `params` in a larger model; the recipe's rules see it before each name.

    Raises:
      ValueError: non-finite weights or statistics (names the site); a fold that changed the function.

    Example:
      >>> qparams, report = awq.quantize(params, awq.calibrate(fn, params, batches), awq.Recipe(group_size=64))
    """
    recipe = recipe or Recipe()
    todo = plan(calibration, recipe, prefix)
    moments = dict(calibration.moments)
    if todo.folds:
        dense = params
        params, scales = fold_scales(params, calibration, recipe, todo)
        check_fold(calibration.fn, dense, params, *calibration.example)
        for name, s in scales.items():
            moments[calibration.traced.sites[name].group] = calibration.of(name).scaled(1 / s)
    leaves = named_leaves(params)
    out, reports = dict(leaves), []
    for names in batches_of_sites(calibration, recipe, todo):
        found = quantize_group(names, leaves, calibration, moments, recipe, todo)
        out |= {name: q for name, (q, _) in found.items()}
        reports += [report for _, report in found.values()]
    return jax.tree.unflatten(jax.tree.structure(params), list(out.values())), tuple(reports)


def batches_of_sites(calibration: Calibration, recipe: Recipe, todo: Plan) -> list[list[str]]:
    """Sites that can be solved as one matrix: same input, same spec, and no input scale of their own."""
    batches: dict[Any, list[str]] = {}
    for name, spec in todo.specs.items():
        site = calibration.traced.sites[name]
        key = (site.group, spec, todo.clips[name], site.lead, site.stacked) if recipe.fold else name
        batches.setdefault(key, []).append(name)
    return list(batches.values())


def matrices(leaf: Array, site: Site) -> Array:
    """The site's param as float32 (n, i, o), layers and experts merged into n."""
    w = site.layout.matrix(jnp.asarray(leaf, jnp.float32))
    return w.reshape(-1, site.in_features, site.out_features)


def mapped(f: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`f(*args, **options)` over the first axis, compiled for one element; no loop where there is only one."""
    if jax.tree.leaves(args)[0].shape[0] == 1:
        return jax.tree.map(lambda a: a[None], f(*jax.tree.map(lambda a: a[0], args), **options))
    return looped(f, tuple(sorted(options.items())), args)


@ft.partial(jax.jit, static_argnums=(0, 1))
def looped(f: Callable[..., Any], options: tuple[tuple[str, Any], ...], args: tuple[Any, ...]) -> Any:
    return jax.lax.map(lambda a: f(*a, **dict(options)), args)


def flat_moments(moments: Moments, site: Site) -> Moments:
    """Layers and experts as one axis; an axis of one where there are none."""
    lead = site.stacked + len(site.lead)
    if moments.count.ndim < lead:
        raise ValueError(f"{site.name}: moments have {moments.count.ndim} leading axes, the weight {lead}.")
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[lead:]), moments)


def fold_scales(params: Any, calibration: Calibration, recipe: Recipe, todo: Plan) -> tuple[Any, dict[str, Array]]:
    """Params with the scales of every fold put in, and by site the scale of its input channels."""
    traced, leaves = calibration.traced, named_leaves(params)
    factors, scales = {}, {}
    for k in todo.folds:
        f = traced.folds[k]
        first = traced.sites[f.sites[0]]
        wanted = [name for name in f.sites if name in todo.specs]
        w = jnp.concatenate([matrices(leaves[n], traced.sites[n]) for n in wanted], -1)
        groups = {traced.sites[n].group: flat_moments(calibration.of(n), traced.sites[n]) for n in wanted}
        pooled = sum_moments(list(groups.values()))
        channels = jnp.broadcast_to(f.channels(wanted[0]), w.shape[:2])
        spec = todo.specs[wanted[0]]
        factor, _, error = mapped(find_scale, w, pooled, channels, n=f.n, spec=spec, strategy=recipe.scale)
        require_finite(error, wanted, leaves)
        factors[k] = factor.reshape(-1, f.n) if first.stacked else factor[0]
        for name in f.sites:
            own = jnp.concatenate([factors[k], jnp.ones((*factors[k].shape[:-1], 1))], -1)
            scales[name] = own[..., f.channels(name)]
    return fold(params, factors, traced.folds), scales


def sum_moments(parts: list[Moments]) -> Moments:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def require_finite(error: Array, names: list[str], leaves: dict[str, Array]) -> None:
    if np.isfinite(np.asarray(error)).all():
        return
    for name in names:
        bad = ~np.isfinite(np.asarray(leaves[name], np.float32))
        if bad.any():
            raise ValueError(f"{name}: {int(bad.sum())} of {bad.size} weights are NaN or infinite. Repair the model.")
    raise ValueError(
        f"{', '.join(names)}: the search's error is not finite, though the weights are. The activations overflow on "
        "the calibration text, or the strategy divides by zero."
    )


def quantize_group(
    names: list[str],
    leaves: dict[str, Array],
    calibration: Calibration,
    moments: dict[str, Moments],
    recipe: Recipe,
    todo: Plan,
) -> dict[str, tuple[QuantizedTensor, SiteReport]]:
    """Clip and round the sites `names`, which share an input, as one matrix; scale them first when unfolded."""
    first = calibration.traced.sites[names[0]]
    spec, clip = todo.specs[names[0]], todo.clips[names[0]]
    m = flat_moments(moments[first.group], first)
    w = jnp.concatenate([matrices(leaves[n], calibration.traced.sites[n]) for n in names], -1)
    s = None
    if not recipe.fold:
        i = first.in_features
        channels = jnp.broadcast_to(jnp.arange(i), w.shape[:2])
        s, _, error = mapped(find_scale, w, m, channels, n=i, spec=spec, strategy=recipe.scale)
        require_finite(error, names, leaves)
        w, m = w * s[..., None], m.scaled(1 / s)
    found = mapped(solve, w, m, spec=spec, clip=clip, rounding=recipe.rounding)
    require_finite(found.error, names, leaves)
    reached = np.asarray(m.count) > 0
    out, column = {}, 0
    for name in names:
        site = calibration.traced.sites[name]
        part = slice(column, column := column + site.out_features)
        shape = leaves[name].shape[: site.stacked] + site.lead
        own = lambda a, shape=shape: a.reshape(*shape, *a.shape[1:])
        q = assemble(
            own(found.codes[..., part]),
            own(found.steps[..., part]),
            own(found.zeros[..., part]),
            spec,
            in_features=site.in_features,
            dtype=jnp.dtype(leaves[name].dtype),
            input_scale=None if s is None else own(1 / s),
            layout=None if site.layout.is_matrix else site.layout,
        )
        energy = np.maximum(float(found.energy[..., part].sum()), 1e-30)
        note = todo.notes.get(name, "")
        if not reached.all():
            note = f"{(~reached).sum()} of {reached.size} never reached: rounded to nearest"
        error, nearest_error = (float(e[..., part].sum()) / energy for e in (found.error, found.nearest_error))
        out[name] = (q, SiteReport(name, spec, error, nearest_error, note))
    return out

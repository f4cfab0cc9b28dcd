"""`quantize(params, calibration, recipe)`: every site of a function, from dense params to QuantizedTensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from threadpoolctl import threadpool_limits

from awq_jax.search.moments import Moments
from awq_jax.search.solve_sites import scale_of_fold, solve_sites
from awq_jax.tracing.sites import Fold, Site, Traced
from awq_jax.transforms.calibrate import Calibration
from awq_jax.transforms.finite import require_finite_weights
from awq_jax.transforms.folding import by_channel, check_folds, fold
from awq_jax.transforms.recipe import Recipe, some
from awq_jax.weights.layout import one_layer
from awq_jax.weights.paths import named_leaves
from awq_jax.weights.sharding import placed_like
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import LARGEST_HALF, SCALE_DTYPE, SMALLEST_HALF, is_quantized, step_dtype

LOST = 0.2
"""Of a site's output in squares; a report says where more is."""
FAINT = "its outputs are too small to be measured in float32: the error is not known"


@dataclass(frozen=True)
class SiteReport:
    """What became of one param: squared output errors relative to the output's squares, on the calibration's moments.

    An error of 1 % is an output that is off by 10 % of its size.
    `nearest_error` is that of rounding the dense param to nearest, without scale or clip.
    `spec` is None, and the errors are 0, where it stays dense though it is a matrix; `note` says why. It also says
    where more than LOST of the output is lost, where no input but zeros was seen, where steps end at float16's bounds.
    """

    name: str
    spec: QuantSpec | None
    error: float
    nearest_error: float
    note: str = ""

    def __str__(self) -> str:
        if self.spec is None:
            return f"{self.name}: {self.note}"
        errors = f"error {self.error:.2%}, to nearest {self.nearest_error:.2%}"
        group = f"{self.spec.bits} bits in groups of {self.spec.group_size}"
        return "; ".join(filter(None, (f"{self.name}: {group}", errors, self.note)))


@dataclass(frozen=True)
class Plan:
    """Everything about one quantization that shapes alone decide."""

    specs: dict[str, QuantSpec]
    clips: dict[str, Callable[..., Any]]
    folds: tuple[int, ...]
    notes: dict[str, str]


def plan(calibration: Calibration, recipe: Recipe, prefix: str = "") -> Plan:
    """The spec and clip of every quantized site, the folds that are used, and why others are not.

    Args:
      prefix: the recipe's rules see `prefix + name`.
    """
    traced = calibration.traced
    notes = {n: f"not a matmul's: {why}" for n, why in traced.skipped.items()}
    decided = {n: decide(site, recipe, prefix) for n, site in traced.sites.items()}
    specs = {n: spec for n, (spec, _) in decided.items() if spec}
    refused, usable = {}, []
    for k, candidate in enumerate(traced.folds if recipe.folds else ()):
        wanted = [n for n in candidate.sites if n in specs]
        if wanted and (why := fold_refused(candidate, traced, specs)):
            refused |= dict.fromkeys(wanted, f"not folded: {why}")
        elif wanted:
            usable.append(k)
    if recipe.folds:
        notes |= {n: f"not folded: {why}" for n in specs if (why := traced.sites[n].refused)}
    notes |= {n: note for n, (_, note) in decided.items() if note} | refused
    return Plan(specs, {n: recipe.clip_of(prefix + n) for n in specs}, tuple(usable), notes)


def decide(site: Site, recipe: Recipe, prefix: str = "") -> tuple[QuantSpec | None, str]:
    """The spec of a site, None where it stays dense; and a note on what is odd about that."""
    spec, is_named = recipe.spec_of(prefix + site.name), recipe.rule_of(prefix + site.name) is not None
    if spec is None or not site.kept:
        return spec, ""
    if is_named:
        return spec, f"quantized as a rule names it: {site.kept}"
    return None, f"{site.kept}; a rule that names it quantizes it"


def fold_refused(candidate: Fold, traced: Traced, specs: Mapping[str, QuantSpec]) -> str | None:
    """Why a fold is not used with these specs of its quantized sites; None if it can be."""
    first, *others = (name for name in candidate.sites if name in specs)
    if any(specs[name] != specs[first] for name in others):
        return "its sites have different specs"
    if any(not np.array_equal(candidate.channels(name), candidate.channels(first)) for name in others):
        return "its sites read different channels"
    return None


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
      ValueError: non-finite weights or statistics (names the site); a fold that changed the function; a rule that
        matches no site; params other than those that were calibrated.

    Example:
      >>> qparams, report = awq.quantize(params, awq.calibrate(fn, params, batches), awq.Recipe(group_size=64))
      >>> print(*report, sep="\n")
    """
    # Accelerators would multiply float32 in fewer bits.
    if not isinstance(recipe, Recipe | None):
        raise ValueError(f"recipe={recipe!r}: give an awq.Recipe, awq.PRESETS['rtn'] say.")
    check_params(params, calibration)
    with jax.default_matmul_precision("highest"):
        return _quantize(params, calibration, recipe or Recipe(), prefix)


def check_params(params: Any, calibration: Calibration) -> None:
    """Refuse params that are not those that were calibrated."""
    leaves = named_leaves(params)
    for name, site in calibration.traced.sites.items():
        if name not in leaves:
            raise ValueError(
                f"{name} was calibrated, the params have {', '.join([*leaves][:4])}: give the same params."
            )
        if is_quantized(leaves[name]):
            raise ValueError(f"{name} is quantized already: give the dense params.")
        shape = np.shape(leaves[name])
        if one_layer(shape, site.stack) != site.layout.shape:
            raise ValueError(f"{name} has shape {shape}, calibrated was {site}: give the same params.")


def _quantize(params: Any, calibration: Calibration, recipe: Recipe, prefix: str) -> tuple[Any, tuple[SiteReport, ...]]:
    if not prefix:
        recipe.check_rules(calibration.traced.sites, calibration.traced.skipped)
    todo = plan(calibration, recipe, prefix)
    scales: dict[str, Array] = {}
    if todo.folds:
        used = tuple(calibration.traced.folds[k] for k in todo.folds)
        if calibration.example:
            check_folds(calibration.fn, params, used, *calibration.example)
        params, scales = fold_scales(params, calibration, recipe, todo)
    leaves = named_leaves(params)
    out, reports = dict(leaves), []
    for names in batches_of_sites(calibration, recipe, todo, scales):
        layout = calibration.traced.sites[names[0]].layout
        tensors, errors = solve_sites(
            tuple(leaves[name] for name in names),
            calibration.of(names[0]),
            scales.get(names[0]),
            layouts=tuple(calibration.traced.sites[name].layout for name in names),
            spec=todo.specs[names[0]],
            scale=recipe.scale if names[0] not in scales and recipe.beside else None,
            clip=todo.clips[names[0]],
            rounding=recipe.rounding,
            half=not recipe.beside,
        )
        require_finite(errors, names, leaves)
        unreached = unreached_note(calibration.of(names[0]), layout.n_lead)
        for name, tensor, (*sums, smallest, largest) in zip(names, tensors, np.asarray(errors).tolist(), strict=True):
            dtype = step_dtype(smallest, largest) if recipe.beside else SCALE_DTYPE
            tensor = replace(tensor, scales=tensor.scales.astype(dtype))
            error, nearest = relative(*sums)
            faint = "" if sums[-1] or unreached or not jnp.any(leaves[name]) else FAINT
            notes = (todo.notes.get(name), unreached, bounds_note(dtype, smallest, largest), lost_note(error), faint)
            note = "; ".join(filter(None, notes))
            out[name] = placed_like(tensor, leaves[name])
            reports.append(SiteReport(name, todo.specs[name], error, nearest, note))
    reports += [
        SiteReport(n, None, 0.0, 0.0, f"left dense: {why}") for n, why in todo.notes.items() if n not in todo.specs
    ]
    return jax.tree.unflatten(jax.tree.structure(params), list(out.values())), tuple(reports)


def relative(error: float, nearest: float, energy: float) -> tuple[float, float]:
    """Both errors relative to the energy; all is lost where there is an error in what has none."""
    error, nearest = (e / energy if energy > 0 else float(e > 0) for e in (error, nearest))
    return error, nearest


def bounds_note(dtype: Any, smallest: float, largest: float) -> str:
    """Whether steps, kept in `dtype`, end at float16's bounds."""
    if dtype != SCALE_DTYPE:
        return ""
    low = [f"steps of {SMALLEST_HALF:.0e}, the smallest that float16 has"] * (smallest <= SMALLEST_HALF)
    return "; ".join(low + [f"steps of {LARGEST_HALF:.0f}, the largest that float16 has"] * (largest >= LARGEST_HALF))


def lost_note(error: float) -> str:
    if error <= LOST:
        return ""
    return f"loses {error:.0%} of its output: give it more bits or smaller groups, or skip it"


def unreached_note(moments: Moments, n_lead: int) -> str:
    """Which layers and experts saw nothing, and what they are rounded by; the last `n_lead` axes are experts'."""
    reached = np.asarray(moments.reached)
    if reached.all():
        return ""
    lent = n_lead and reached.any(tuple(range(reached.ndim - n_lead, reached.ndim))).all()
    by = "the statistics of all experts" if lent else "their weights alone"
    which = ["/".join(map(str, k)) for k in np.argwhere(~reached).tolist()]
    named = f" ({some(which)})" if reached.ndim else ""
    zeros = (np.asarray(moments.count) > 0)[~reached].any()
    by_what = "no token but zeros" if zeros else "no token"
    return f"{len(which)} of {reached.size} reached by {by_what}{named}: rounded by {by}"


def batches_of_sites(
    calibration: Calibration, recipe: Recipe, todo: Plan, scales: Mapping[str, Array]
) -> list[list[str]]:
    """Sites that can be solved as one matrix: same input, same spec, and no input scale of their own."""
    batches: dict[Any, list[str]] = {}
    for name, spec in todo.specs.items():
        site = calibration.traced.sites[name]
        own = name not in scales and recipe.beside
        key = name if own else (site.group, name in scales, spec, todo.clips[name], site.lead, site.stacked)
        batches.setdefault(key, []).append(name)
    return list(batches.values())


def fold_scales(params: Any, calibration: Calibration, recipe: Recipe, todo: Plan) -> tuple[Any, dict[str, Array]]:
    """Params with the scales of every fold put in, and by site the scale of its input channels."""
    traced, leaves = calibration.traced, named_leaves(params)
    factors, scales = {}, {}
    for k in todo.folds:
        f = traced.folds[k]
        wanted = [name for name in f.sites if name in todo.specs]
        groups = {traced.sites[n].group: calibration.of(n) for n in wanted}
        factors[k], error = scale_of_fold(
            tuple(leaves[n] for n in wanted),
            tuple(groups.values()),
            f.channels(wanted[0]),
            layouts=tuple(traced.sites[n].layout for n in wanted),
            n=f.n,
            spec=todo.specs[wanted[0]],
            strategy=recipe.scale,
        )
        require_finite(error, wanted, leaves)
        for name in f.sites:
            scales[name] = by_channel(factors[k], f.channels(name))
    return fold(params, factors, traced.folds), scales


def require_finite(error: Array, names: list[str], leaves: dict[str, Array]) -> None:
    if np.isfinite(np.asarray(error)).all():
        return
    require_finite_weights(leaves)
    raise ValueError(
        f"{', '.join(names)}: the search's error is not finite, though the weights are. The activations overflow on "
        "the calibration text, or the strategy divides by zero or factors a singular Gram matrix (shrink=0)."
    )

"""Finds the sites of a function by tracing it: its matmuls with params, which share an input, what can be folded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

from awq_jax.kernels.partitioning import names_of
from awq_jax.tracing.folds.solve import Components, components
from awq_jax.tracing.folds.unknowns import Dot, Walk
from awq_jax.weights.layout import Layout, one_layer, stack_places
from awq_jax.weights.paths import named_leaves
from awq_jax.weights.tensor import is_quantized


@dataclass(frozen=True)
class Site:
    """A matmul of an activation with a param.

    Args:
      name: the param's path, "layers_0/attn/q/kernel".
      layout: how the param is read as matrices (*lead, in_features, out_features).
      stack: where the param's axes of layers are, as in Layout: a scan takes one after the other, or each is picked.
      lead: sizes of its batch axes (experts).
      group: name of the first site that reads the same input; its own name if none does before.
      refused: why its input channels cannot be rescaled by a fold; None if they can.
      kept: why it stays dense unless a rule names it (a tied embedding, a router, an adapter); None for most.
    """

    name: str
    layout: Layout
    stack: tuple[int, ...]
    lead: tuple[int, ...]
    in_features: int
    out_features: int
    group: str
    refused: str | None
    kept: str | None = None

    @property
    def stacked(self) -> int:
        """How many axes of layers the param has."""
        return len(self.stack)

    def __str__(self) -> str:
        sizes = " x ".join(map(str, (*self.lead, self.in_features, self.out_features)))
        parts = [f"layers of {sizes}" if self.stacked else sizes]
        parts += [f"same input as {self.group}"] * (self.group != self.name)
        parts += [f"cannot fold: {self.refused}"] * bool(self.refused)
        parts += [f"stays dense: {self.kept}"] * bool(self.kept)
        return "; ".join(parts)


@dataclass(frozen=True)
class Member:
    """A param that takes part in a fold: along `axes` (merged), position k is scaled by `channels[k]`'s factor.

    `stack` tells where its axes of layers are, as in Layout. `channels` is -1 where the param stays as it is;
    `inverse` members (a norm's weight, the outputs of the linear before) are divided, the others multiplied. `offset`
    is 1 for a norm that multiplies by 1 + w.
    """

    param: str
    axes: tuple[int, ...]
    stack: tuple[int, ...]
    channels: np.ndarray
    inverse: bool
    offset: float


@dataclass(frozen=True)
class Fold:
    """One channel freedom of the function: `n` positive factors, and every param that must follow them."""

    n: int
    members: tuple[Member, ...]
    sites: tuple[str, ...]
    inputs: tuple[np.ndarray, ...]

    def channels(self, site: str) -> np.ndarray:
        """For each input channel of `site`, in its layout's order, its factor's number; -1 where it has none."""
        return self.inputs[self.sites.index(site)]


@dataclass(frozen=True)
class Traced:
    """What tracing found: sites by name, in the order in which they run, the folds, and why other params are none.

    `skipped` has the params of two or more axes that no matmul reads as a whole, biases of several heads left out.
    """

    sites: dict[str, Site]
    folds: tuple[Fold, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        """A line a site, then a line for each param that is none."""
        width = max(map(len, (*self.sites, *self.skipped)), default=0)
        lines = [f"{name:{width}}  {site}" for name, site in self.sites.items()]
        return "\n".join([*lines, *(f"{name:{width}}  no site: {why}" for name, why in self.skipped.items())])


def abstract(params: Any) -> Any:
    """Shapes and dtypes of the dense params that `params` stands for."""
    return jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype) if is_quantized(w) else jax.eval_shape(lambda: w),
        params,
        is_leaf=is_quantized,
    )


LOOKS_AT_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def trace(fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """The jaxpr of `fn(params, *inputs)`, and the shapes of its outputs."""
    try:
        return jax.make_jaxpr(fn, return_shape=True)(params, *inputs)
    except LOOKS_AT_VALUES as e:
        raise ValueError(
            "The function looks at values of its params or inputs, of which a trace knows only the shapes: "
            f"{str(e).splitlines()[0]} Use jax.lax.cond or jnp.where, or bind what is no array: "
            "functools.partial(fn, train=False)."
        ) from e


def sites(fn: Callable[..., Any], params: Any, *inputs: Any) -> Traced:
    """The sites of `fn(params, *inputs)`.

    Args:
      fn: any traceable function of a params pytree and arrays.
      params: arrays or ShapeDtypeStructs; nothing is computed with them.
      inputs: arrays or ShapeDtypeStructs.

    Raises:
      ValueError: params that are quantized, or cut along mesh axes of type Explicit; a function that looks at values.

    Example:
      >>> print(awq.sites(model.apply, params, tokens))
    """
    leaves = named_leaves(params)
    for name, leaf in (leaves | named_leaves(inputs)).items():
        _refuse(name, leaf)
    jaxpr, _ = trace(fn, params, inputs)
    found = components(jaxpr, {k: (name, np.shape(leaf)) for k, (name, leaf) in enumerate(leaves.items())})
    dots: dict[str, list[Dot]] = {}
    for dot in found.walk.dots:
        dots.setdefault(dot.param, []).append(dot)
    no_site = {name: why for name, uses in dots.items() if (why := _no_site(leaves[name], uses))}
    groups: dict[Any, str] = {}
    out: dict[str, Site] = {}
    for name in [n for n in dots if n not in no_site]:
        group = groups.setdefault(_same_input(leaves[name], dots[name]), name)
        out[name] = _site(found, name, dots[name], group)
    for name, beside in _adapters(out, {name: uses[0].after for name, uses in dots.items()}).items():
        out[name] = replace(out[name], kept=f"an adapter of {beside}")
    skipped = _skipped(found.walk, {name: np.shape(leaf) for name, leaf in leaves.items() if name not in out}, no_site)
    return Traced(out, _folds(found, {n: dots[n][0] for n in out}), skipped)


def _refuse(name: str, leaf: Any) -> None:
    """Raise for an argument that cannot be traced as a dense array."""
    if is_quantized(leaf):
        raise ValueError(f"{name} is quantized: give the dense params; awq.quantized(fn) runs quantized ones.")
    if _is_explicitly_cut(leaf):
        raise ValueError(
            f"{name} is cut along a mesh axis of type Explicit: make the mesh with axis_types=(AxisType.Auto, ...)."
        )


def _no_site(leaf: Any, uses: list[Dot]) -> str | None:
    """Why a param that matmuls read is no site; None if it is one."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"{leaf.dtype.name} weights"
    return "read in two ways" if any(use.layout != uses[0].layout for use in uses) else None


def _site(found: Components, name: str, uses: list[Dot], group: str) -> Site:
    layout = uses[0].layout
    *lead, i, o = layout.seen
    refused, kept = _refusal(found, uses), _kept(found.walk, name)
    return Site(name, layout, uses[0].stack, tuple(lead), i, o, group, refused, kept)


def _skipped(walk: Walk, shapes: dict[str, tuple[int, ...]], no_site: dict[str, str]) -> dict[str, str]:
    """Why each of these params that is more than a vector is no site."""
    widest = walk.widest
    is_more = lambda name, shape: (
        len(one_layer(shape, walk.stacks[name])) > 1 and not walk.is_vector(name, shape, widest)
    )
    why = lambda name: no_site.get(name) or _names(walk.uses.get(name, ())) or "not used"
    return {name: why(name) for name, shape in shapes.items() if is_more(name, shape)}


def _is_explicitly_cut(leaf: Any) -> bool:
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return False
    names = {name for entry in sharding.spec for name in names_of(entry)}
    return any(sharding.mesh.axis_types[sharding.mesh.axis_names.index(name)] == AxisType.Explicit for name in names)


def _same_input(leaf: Any, uses: list[Dot]) -> Any:
    """Equal for sites that read the same tensors, layer by layer and expert by expert."""
    first = uses[0]
    layers = tuple(np.shape(leaf)[k] for k in stack_places(first.stack))
    return layers, first.layout.seen[:-2], tuple((use.reads, use.picks) for use in uses)


def _kept(walk: Walk, name: str) -> str | None:
    if walk.uses.get(name):
        return f"also used by {_names(walk.uses[name])}"
    return "its outputs are ranked (a router, or a head before argmax)" if name in walk.ranked else None


def _names(uses: Iterable[str]) -> str:
    return ", ".join(sorted(uses))


def _adapters(found: dict[str, Site], after: dict[str, str | None]) -> dict[str, str]:
    """Pairs of low rank (LoRA): two matmuls in a row beside a site that reads what the first reads, as wide as both.

    Args:
      after: by site the one whose output it reads, if nothing but a factor is between them.
    """
    out = {}
    for up in found.values():
        down = found.get(after[up.name] or "")
        if down is None or 2 * down.out_features > min(down.in_features, up.out_features):
            continue
        beside = [s.name for s in found.values() if s.group == down.group and s.out_features == up.out_features]
        if beside:
            out |= {down.name: beside[0], up.name: beside[0]}
    return out


def _refusal(found: Components, uses: list[Dot]) -> str | None:
    if any(pick is not None for use in uses for pick in use.picks):
        return "sliced layer by layer"
    ids = np.unique(np.abs(np.concatenate([use.in_ids for use in uses])))
    if found.component[ids].any():
        return None
    return next((found.reasons[found.why[k]] for k in ids if k), "its input axis is not one axis of a value")


def _folds(found: Components, dots: dict[str, Dot]) -> tuple[Fold, ...]:
    """Sites whose input channels share a component share a fold."""
    inputs = {name: found.component[np.abs(dot.in_ids)] for name, dot in dots.items()}
    pools = _sharing({name: set(of.tolist()) - {0} for name, of in inputs.items()})
    number, flip, pool_of = (np.full(found.component.max() + 1, fill) for fill in (-1, 1, -1))
    for k, (names, comps) in enumerate(pools):
        number[sorted(comps)], pool_of[list(comps)] = np.arange(len(comps)), k
        for name in reversed(names):
            flip[inputs[name]] = found.sign[np.abs(dots[name].in_ids)]
    members: list[list[Member]] = [[] for _ in pools]
    for (param, axes), ids in found.walk.ids.items():
        comp = found.component[ids]
        of, sign = pool_of[comp], found.sign[ids] * flip[comp]
        offset = found.walk.offsets.get(param, 0.0)
        for k in np.unique(of[of >= 0]):
            for inverse, mine in ((False, (of == k) & (sign > 0)), (True, (of == k) & (sign < 0))):
                if mine.any():
                    channels = np.where(mine, number[comp], -1)
                    members[k].append(Member(param, axes, found.walk.stacks[param], channels, inverse, offset))
    return tuple(
        Fold(len(comps), tuple(of_pool), tuple(names), tuple(number[inputs[name]] for name in names))
        for (names, comps), of_pool in zip(pools, members, strict=True)
    )


def _sharing(components: dict[str, set[int]]) -> list[tuple[list[str], set[int]]]:
    """Names that share a component, or do so with a third; and the components of all of them."""
    parent: dict[int, int] = {}

    def root(c: int) -> int:
        while parent.setdefault(c, c) != c:
            parent[c] = c = parent[parent[c]]
        return c

    joined = {name: min(of) for name, of in components.items() if of}
    for name, first in joined.items():
        for c in components[name]:
            parent[root(c)] = root(first)
    pools: dict[int, tuple[list[str], set[int]]] = {}
    for name, first in joined.items():
        names, comps = pools.pop(root(first), ([], set()))
        pools[root(first)] = ([*names, name], comps | components[name])
    return [*pools.values()]

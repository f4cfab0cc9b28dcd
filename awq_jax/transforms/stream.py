"""`stream`: any function is calibrated, quantized and handed over segment by segment.

In memory are one segment's params and moments, and what goes from segment to segment for the calibration batches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from awq_jax.clock import Clock
from awq_jax.memory import check_memory, give_back, matmul_bytes, nbytes_of
from awq_jax.search.moments import Moments
from awq_jax.tracing.flat import Param, Value
from awq_jax.tracing.live import Live
from awq_jax.tracing.program import Program, slot
from awq_jax.tracing.segments import Segment, Segments, segments
from awq_jax.tracing.view import View
from awq_jax.transforms.calibrate import UNFIT, Calibration, check_batch, quantized, with_moments
from awq_jax.transforms.finite import finite, require_finite
from awq_jax.transforms.quantize import SiteReport, quantize
from awq_jax.transforms.recipe import Recipe
from awq_jax.weights.paths import named_leaves
from awq_jax.weights.spec import Rule
from awq_jax.weights.tensor import is_quantized

Feed = Literal["dense", "quantized"]
BUDGET = 2**26
"""Bytes of live values that memory holds."""
Solve = Callable[[Any, Calibration, Recipe], tuple[Any, tuple[SiteReport, ...]]]


@dataclass(frozen=True)
class Streamed:
    """What happened.

    Args:
      reports: one for every site, or layer of a site.
      seconds: by stage.
      largest: the largest |x| of what goes from segment to segment, of outputs that are no larger than that, or of what
        the sites read as far as moments tell.
      held: the most bytes of params, of moments and of live values at a time.
      params: the quantized params, unless they were written.
    """

    reports: tuple[SiteReport, ...]
    seconds: dict[str, float]
    largest: float
    held: dict[str, int] = field(repr=False)
    params: Any = field(repr=False)


@dataclass(frozen=True)
class Lazy:
    """A param that is read when it is indexed: `read(index)` gives the part of it.

    Example:
      >>> params = {"w": awq.Lazy((8, 64, 64), jnp.dtype("float32"), lambda index: h5["w"][index])}
    """

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[Any], Any]

    def __getitem__(self, index: Any) -> Any:
        return self.read(index)


def stream(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    recipe: Recipe | None = None,
    write: Callable[[str, Any], None] | None = None,
    *,
    feed: Feed = "dense",
    solve: Solve = quantize,
    budget: float = BUDGET,
    called: str | None = None,
    clock: Clock | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Streamed:
    """Quantize a function of which not all params need fit into memory, and hand each param over when it is done.

    Args:
      fn: pure function of (params, *inputs).
      params: pytree of dense params, of which only shapes and dtypes are looked at until their turn: arrays,
        np.memmap, `Lazy`, or whatever else has a shape and a dtype and is read when it is indexed.
      batches: tuples of inputs.
      recipe: None for 4 bits in groups of 128.
      write: called with each param's path and what became of it, an array or a QuantizedTensor, as soon as that is
        known. Layers of a stack come one by one, as "layers/q[3]". None to have all of them in the result.
      feed: whether a segment is calibrated on what the dense segments before it give, or the quantized ones.
      solve: what becomes of a segment's params, in place of `quantize`.
      budget: bytes of what goes from segment to segment that memory may hold; the rest goes to temporary files.
      called: what errors call the batches; None for their number.
      clock: goes on counting; None for a new one.
      progress: called with "segment", how many are done, and how many there are.

    Raises:
      ValueError: no batches, or inputs that the function cannot take; no site; a rule that matches none; non-finite
        weights or statistics, or a fold that changes its segment (both name the site).

    Example:
      >>> params = jax.tree.map(lambda path: np.load(path, mmap_mode="r"), paths)
      >>> awq.stream(fn, params, batches, awq.Recipe(group_size=64), lambda name, w: save(out / name, w))
    """
    if feed not in get_args(Feed):
        raise ValueError(f"feed={feed!r}: choose one of {', '.join(get_args(Feed))}.")
    clock, recipe, leaves = clock or Clock(), recipe or Recipe(), named_leaves(params)
    kept: dict[Param, Any] = {}
    hand_over = kept.__setitem__ if write is None else lambda param, leaf: write(str(param), leaf)
    with clock("trace"):
        variants, live = _entered(fn, params, batches, budget)
        first = variants[0]
        check_recipe(recipe, first)
        _refuse_too_large(called or f"{len(variants)} batches", variants, budget)
    reports: list[SiteReport] = []
    largest, held = 0.0, {"params": 0, "moments": 0, "live": 0}
    after, tried = needed_after(variants), set[Any]()
    for k, segment in enumerate(first.segments):
        with clock("load"):
            stored = {slot(j): _stored(p, leaves[p.name]) for j, p in enumerate(segment.params)}
        held["params"] = max(held["params"], segment.nbytes)
        parts = [variant.segments[k] for variant in variants]
        # That a fold changes nothing is a matter of the program: equal segments need not try it again.
        rules = own_rules(recipe, segment)
        case = segment.program, tuple(f.sites for f in segment.traced.folds), rules.rules
        example = () if case in tried else tuple(live[0].get(parts[0].reads))
        tried.add(case)
        inputs = (
            [values.get(part.reads) for part, values in zip(parts, live, strict=True)] if feed == "quantized" else []
        )
        with clock("statistics"):
            moments, peak = _statistics(parts, live, after[k], segment.program, stored, recipe.gram_block)
            largest = max(largest, peak)
            give_back()
        held["moments"] = max(held["moments"], sum(a.nbytes for a in jax.tree.leaves(moments)))
        with clock("search"):
            calibration = Calibration(segment.program.fn, segment.traced, moments, example)
            done, found = _solved(solve, stored, calibration, rules, segment)
        if feed == "quantized":
            with clock("statistics"):
                for part, values, given in zip(parts, live, inputs, strict=True):
                    values.put(part.writes[: part.program.passed], low_bit(part.program)(done, *given))
        with clock("write"):
            for j, p in enumerate(segment.params):
                if p in segment.owned:
                    hand_over(p, done[slot(j)])
        reports += found
        del stored, done, moments, calibration, inputs
        progress("segment", k + 1, len(first.segments))
    with clock("write"):
        for name in first.unread:
            hand_over(Param(name), _stored(Param(name), leaves[name]))
    held["live"] = sum(values.most for values in live)
    whole = assembled(params, kept) if write is None else None
    return Streamed(tuple(reports), clock.seconds, largest, held, whole)


def _statistics(
    parts: list[Segment],
    live: list[Live],
    after: Iterable[Any],
    first: Program,
    stored: Mapping[str, Array],
    block: int | None,
) -> tuple[dict[str, Moments], float]:
    """The moments of a segment over all batches, whose live values go through it; and the largest |x| met.

    Args:
      after: by batch the values that are needed still.
    """
    moments, largest = dict[str, Moments](), 0.0
    for part, values, wanted in zip(parts, live, after, strict=True):
        passed, new, peak = observed(part.program, first, block)(stored, *values.get(part.reads))
        moments = {group: moments[group] + m for group, m in new.items()} if moments else new
        values.put(part.writes[: part.program.passed], passed)
        values.keep(wanted)
        largest = max(largest, float(peak))
    return moments, max(largest, float(largest_input(moments)))


def assembled(params: Any, parts: Mapping[Param, Any]) -> Any:
    """The pytree of what became of `params`, of which some come layer by layer."""
    layers: dict[str, dict[Param, Any]] = {}
    for param, leaf in parts.items():
        layers.setdefault(param.name, {})[param] = leaf
    return jax.tree.unflatten(jax.tree.structure(params), [_stacked(layers[name]) for name in named_leaves(params)])


def _stacked(layers: dict[Param, Any]) -> Any:
    """One array, or QuantizedTensor, of all layers of a param."""
    if len(layers) == 1:
        return next(iter(layers.values()))
    inner: dict[int, dict[Param, Any]] = {}
    for param, leaf in layers.items():
        rest = replace(param, stack=param.stack[1:], picks=param.picks[1:])
        inner.setdefault(param.picks[0], {})[rest] = leaf
    parts = [_stacked(inner[k]) for k in sorted(inner)]
    axis = next(iter(layers)).stack[0]
    if not is_quantized(parts[0]):
        return jnp.stack(parts, axis)
    whole = jax.tree.map(lambda *a: jnp.stack(a), *parts)
    shape = parts[0].shape
    layout = whole.layout or View.of(shape).layout(range(len(shape) - 2), [len(shape) - 2])
    stack = (axis, *(layout.stack or (0,) * (len(next(iter(layers)).stack) - 1)))
    layout = replace(layout, stack=stack if any(stack) else ())
    return replace(whole, layout=None if layout.is_matrix else layout)


def _entered(
    fn: Callable[..., Any], params: Any, batches: Iterable[tuple[Any, ...]], budget: float
) -> tuple[list[Segments], list[Live]]:
    """For each batch the function's segments, of which batches of equal shapes share theirs, and its inputs."""
    batches = list(batches)
    if not batches:
        raise ValueError("No calibration batch was given: pass an iterable of tuples of inputs.")
    by_shapes: dict[Any, Segments] = {}
    variants, live = [], []
    for k, batch in enumerate(batches):
        check_batch(k, batch)
        inputs = jax.tree.leaves(tuple(batch))
        shapes = tuple(f"{jnp.result_type(x)} {jnp.shape(x)}" for x in inputs)
        require_finite(k, finite(tuple(batch), None, {}), params)
        if shapes not in by_shapes:
            like = next(iter(by_shapes.values()), None)
            try:
                by_shapes[shapes] = segments(fn, params, *batch, like=like)
            except UNFIT as e:
                found = f"{type(e).__name__}: {e}"
                raise ValueError(
                    f"Batch {k + 1}: the function cannot take inputs of {', '.join(shapes)}: {found}"
                ) from e
        variants.append(by_shapes[shapes])
        live.append(Live(budget / len(batches)))
        live[-1].put(variants[-1].inputs, inputs)
    return variants, live


def needed_after(variants: list[Segments]) -> list[list[set[Value]]]:
    """For each segment and batch what later segments read."""
    wanted: list[set[Value]] = [set() for _ in variants]
    found = []
    for k in reversed(range(len(variants[0].segments))):
        found.append([set(values) for values in wanted])
        for values, variant in zip(wanted, variants, strict=True):
            values.update(variant.segments[k].reads)
    return found[::-1]


def _refuse_too_large(called: str, variants: list[Segments], budget: float) -> None:
    """Refuse, before any work, batches that memory does not hold while they go through a segment."""
    runs = {s.program for variant in variants for s in variant.segments}
    most = max(matmul_bytes(p.fn, p.params, *p.reads) + nbytes_of([*p.params.values(), *p.reads]) for p in runs)
    live = sum(max(s.live for s in variant.segments) for variant in variants)
    check_memory(f"Calibration on {called}", int(most + min(live, budget)), "give shorter ones, or fewer")


def check_recipe(recipe: Recipe, found: Segments) -> None:
    """Refuse a function without sites, and rules that match none, before anything is read."""
    names = [name for s in found.segments for p in s.sites for name in dict.fromkeys((p.name, str(p)))]
    others = {
        s.params[k].name: why
        for s in found.segments
        for k in range(len(s.params))
        if (why := s.traced.skipped.get(slot(k)))
    }
    if not names:
        told = "; ".join(f"{name}: {why}" for name, why in list(others.items())[:4])
        raise ValueError(f"No matmul reads a param as a whole: nothing to quantize. {told}")
    recipe.check_rules(dict.fromkeys(names), others)


def _stored(param: Param, leaf: Any) -> Array:
    """A param, or its layer, in JAX's memory."""
    part = param.of(leaf)
    return jnp.asarray(part if isinstance(part, np.ndarray | jax.Array) else part[...])


@cache
def observed(program: Program, first: Program, block: int | None) -> Callable[..., Any]:
    """`(params, *reads) -> (what is passed on, moments, largest |x| of that and of outputs no larger)`, compiled.

    Args:
      first: the program of the first batch; it has the names of the groups.
    """
    run = with_moments(program.fn, first.traced, block=block)

    def step(params: Any, *reads: Array) -> tuple[list[Array], dict[str, Moments], Float[Array, ""]]:
        outs, moments = run(params, *reads)
        passed, most = outs[: program.passed], max((x.size for x in reads), default=0)
        # Not logits, which nothing else needs.
        looked_at = [*passed, *(x for x in outs[program.passed :] if x.size <= most)]
        floats = [x for x in looked_at if jnp.issubdtype(x.dtype, jnp.floating)]
        peaks = [jnp.abs(x).max(initial=0).astype(jnp.float32) for x in floats]
        return passed, moments, jnp.stack([jnp.zeros(()), *peaks]).max()

    return jax.jit(step)


@cache
def low_bit(program: Program) -> Callable[..., list[Array]]:
    """`(quantized params, *reads) -> what is passed on`, compiled."""
    run = quantized(program.fn)
    return jax.jit(lambda params, *reads: run(params, *reads)[: program.passed])


@jax.jit
def largest_input(moments: dict[str, Moments]) -> Float[Array, ""]:
    return jnp.stack([jnp.zeros(()), *(m.large for m in moments.values())]).max()


def _solved(
    solve: Solve, params: Any, calibration: Calibration, recipe: Recipe, segment: Segment
) -> tuple[Any, list[SiteReport]]:
    """What `solve` makes of a segment's params, its reports and errors with the params' own names.

    Args:
      recipe: whose rules see slots.
    """
    try:
        done, reports = jax.block_until_ready(solve(params, calibration, recipe))
    except ValueError as e:
        raise type(e)(own_names(str(e), segment)) from e
    owned = {slot(k) for k, p in enumerate(segment.params) if p in segment.owned}
    named = lambda text: own_names(text, segment)
    return done, [replace(r, name=named(r.name), note=named(r.note)) for r in reports if r.name in owned]


def own_names(text: str, segment: Segment) -> str:
    """`text` with the names of params in place of the program's slots."""
    return re.sub(r"<(\d+)>", lambda found: str(segment.params[int(found[1])]), text)


def own_rules(recipe: Recipe, segment: Segment) -> Recipe:
    """`recipe` as it is for the program's slots: rules see the params' names, and with them those of their layers."""
    rules, unclipped = [], []
    for k, p in enumerate(segment.params):
        pattern = f"^{re.escape(slot(k))}$"
        rule = recipe.rule_of(p.name, str(p))
        if p not in segment.owned:
            rules.append(Rule(pattern, skip=True))
        elif rule is not None:
            rules.append(replace(rule, pattern=pattern))
        if recipe.unclipped and re.search(recipe.unclipped, p.name):
            unclipped.append(pattern)
    names = {slot(k) for k in range(len(segment.params))} & {*segment.traced.sites}
    rules = [r for r in rules if any(re.search(r.pattern, n) for n in names)]
    return replace(recipe, rules=tuple(rules), unclipped="|".join(unclipped))

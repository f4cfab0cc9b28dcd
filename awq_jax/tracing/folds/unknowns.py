"""What a walk over a jaxpr keeps: the unknown scales of each value, and the equations between them (see solve.py)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from awq_jax.tracing.view import View
from awq_jax.weights.layout import Layout, in_param, one_layer

Ids = np.ndarray
"""int32, one signed unknown per element (0: none), with size 1 along axes on which it is constant."""


ELEMENTWISE = {"add", "sub", "add_any", "mul", "div"}


@dataclass(frozen=True)
class Value:
    """What is known of one array: its unknown scales, where it came from, and its value if it is one number.

    `product_of` names the param whose matmul it is the output of, scaled and rearranged at most; `origin` the only
    one whose output it was computed from since the last matmul.
    """

    shape: tuple[int, ...]
    terms: tuple[Ids, ...] = ()
    root: Any = None
    view: View | None = None
    param: str | None = None
    constant: float | None = None
    product_of: str | None = None
    origin: str | None = None


@dataclass(frozen=True)
class Dot:
    """One matmul of an activation with a param: `reads` tells which inputs are the same tensor and channels."""

    param: str
    layout: Layout
    stack: tuple[int, ...]
    picks: tuple[int | None, ...]
    reads: Any
    in_ids: Ids
    after: str | None

    @property
    def channels(self) -> int:
        """The most that it reads or writes, its experts' together: a bias or a norm has no more entries."""
        *lead, i, o = self.layout.seen
        return math.prod(lead) * max(i, o)


@dataclass
class Walk:
    """State of one pass over a jaxpr."""

    dead: np.ndarray
    offsets: dict[str, float]
    joint: dict[str, tuple[tuple[int, ...], ...]]
    ids: dict[tuple[str, tuple[int, ...]], Ids] = field(default_factory=dict)
    stacks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    scans: dict[str, int] = field(default_factory=dict)
    dots: list[Dot] = field(default_factory=list)
    found: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    ndims: dict[str, set[int]] = field(default_factory=dict)
    edges: list[tuple[Ids, Ids]] = field(default_factory=list)
    frozen: list[tuple[Ids, str]] = field(default_factory=list)
    unclear: list[tuple[Ids, str]] = field(default_factory=list)
    uses: dict[str, set[str]] = field(default_factory=dict)
    ranked: set[str] = field(default_factory=set)
    scope: tuple[Any, ...] = ()
    count: int = 0
    n_scans: int = 0

    def axes_ids(self, param: str, axes: tuple[int, ...], size: int) -> Ids:
        if (param, axes) not in self.ids:
            self.ids[param, axes] = np.arange(self.count + 1, self.count + 1 + size, dtype=np.int32)
            self.count += size
        return self.ids[param, axes]

    def use(self, value: Value, by: str) -> None:
        """Note that a param, or a slice of its layers, is used by something else than a matmul."""
        if value.param is not None:
            self.uses.setdefault(value.param, set()).add(by)

    @property
    def widest(self) -> int:
        """The most channels of any matmul."""
        return max((dot.channels for dot in self.dots), default=0)

    def is_vector(self, param: str, shape: tuple[int, ...], widest: int) -> bool:
        """Whether a layer of a param is one long vector, however many axes it has (heads, features).

        It is only added and multiplied, and has no more entries than the widest matmul has channels.
        """
        is_elementwise = self.uses.get(param, {""}) <= ELEMENTWISE
        return is_elementwise and math.prod(one_layer(shape, self.stacks[param])) <= widest

    @contextmanager
    def inside(self, what: str) -> Iterator[None]:
        """What is walked in the block runs a number of times of its own."""
        outer, self.scope = self.scope, (*self.scope, (what, object()))
        yield
        self.scope = outer

    def freeze(self, terms: Iterable[Ids], reason: str) -> None:
        self.frozen += [(t.ravel(), reason) for t in terms]

    def freeze_along(self, axes: Iterable[int], terms: Iterable[Ids], reason: str) -> tuple[Ids, ...]:
        """Freeze the terms that vary along any of `axes`; the others."""
        terms, axes = tuple(terms), tuple(axes)
        self.freeze([t for t in terms if varies(t, axes)], reason)
        return tuple(t for t in terms if not varies(t, axes))

    def alive(self, terms: Iterable[Ids]) -> tuple[Ids, ...]:
        """`terms` without the unknowns that an earlier pass proved to be zero."""
        kept = []
        for t in terms:
            known = np.abs(t) < len(self.dead)
            t = np.where(known & self.dead[np.where(known, np.abs(t), 0)], 0, t)
            if t.any():
                kept.append(t)
        return tuple(kept)

    def equal(self, a: tuple[Ids, ...], b: tuple[Ids, ...], reason: str) -> tuple[Ids, ...]:
        """Demand that two values scale alike; the terms of both."""
        a, b = self.alive(a), self.alive(b)
        a_rest: list[Ids] = []
        b_rest = list(b)
        for t in a:
            k = next((k for k, u in enumerate(b_rest) if np.array_equal(t, u)), None)
            if k is None:
                a_rest.append(t)
            else:
                b_rest.pop(k)
        if len(a_rest) <= 1 and len(b_rest) <= 1:
            left = a_rest[0] if a_rest else np.zeros((1,) * (b_rest[0].ndim if b_rest else 0), np.int32)
            right = b_rest[0] if b_rest else np.zeros((1,) * left.ndim, np.int32)
            self.link(left, right, reason)
        else:
            self.unclear += [(t.ravel(), reason) for t in (*a_rest, *b_rest)]
        return a if len(a) >= len(b) else b

    def link(self, a: Ids, b: Ids, reason: str) -> None:
        a, b = (t.ravel() for t in np.broadcast_arrays(a, b))
        self.edges.append((a[(a != 0) & (b != 0)], b[(a != 0) & (b != 0)]))
        self.frozen += [(a[b == 0], reason), (b[a == 0], reason)]


def param_value(walk: Walk, name: str, shape: tuple[int, ...], stack: tuple[int, ...] = ()) -> Value:
    """A param as it enters: one unknown for each position of each axis, or of each set of joint axes."""
    walk.stacks[name] = stack
    full = [in_param(stack, k) for k in range(len(shape))]
    together = [tuple(map(full.index, axes)) for axes in walk.joint.get(name, ()) if set(axes) <= set(full)]
    alone = [(k,) for k in range(len(shape)) if not any(k in axes for axes in together)]
    terms = []
    for axes in (*together, *alone):
        sizes = [n if k in axes else 1 for k, n in enumerate(shape)]
        if math.prod(sizes) > 1:
            terms.append(walk.axes_ids(name, tuple(full[a] for a in axes), math.prod(sizes)).reshape(sizes))
    return Value(shape, tuple(terms), name, View.of(shape, stack), name)


def reshape_ids(ids: Ids, old: tuple[int, ...], new: tuple[int, ...]) -> Ids:
    """`ids` of a value of shape `old` after its reshape to `new`; expands only where axes really mix."""
    pieces: list[int] = []
    full: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b, p, q = i, j, 1, 1
        while True:
            if p == q and (i > a or j > b):
                break
            if p <= q and i < len(old):
                p, i = p * old[i], i + 1
            elif j < len(new):
                q, j = q * new[j], j + 1
            else:
                p, i = p * old[i], i + 1
        constant = all(n == 1 for n in ids.shape[a:i])
        pieces += [1] * (j - b) if constant else list(new[b:j])
        full += [1] * (i - a) if constant else list(old[a:i])
    return collapsed(np.broadcast_to(ids, full).reshape(pieces))


def collapsed(ids: Ids) -> Ids:
    """`ids` with size 1 along axes on which they are constant."""
    for k in range(ids.ndim):
        first, last = ids.take([0], k), ids.take([-1], k)
        if ids.shape[k] > 1 and (first == last).all() and (ids == first).all():
            ids = first
    return ids


@dataclass(frozen=True)
class Scaled:
    """The ids of a value of `shape`, rearranged as it is; see STRUCTURAL."""

    ids: Ids
    shape: tuple[int, ...]

    def transpose(self, permutation: Sequence[int]) -> Scaled:
        return Scaled(self.ids.transpose(permutation), tuple(self.shape[k] for k in permutation))

    def reshape(self, shape: tuple[int, ...]) -> Scaled:
        return Scaled(reshape_ids(self.ids, self.shape, shape), shape)

    def squeeze(self, dimensions: Sequence[int]) -> Scaled:
        left = tuple(n for k, n in enumerate(self.shape) if k not in dimensions)
        return Scaled(self.ids.squeeze(tuple(dimensions)), left)

    def broadcast(self, shape: tuple[int, ...], dimensions: Sequence[int]) -> Scaled:
        return Scaled(spread(self.ids, range(self.ids.ndim), dimensions, len(shape)), shape)

    def pick(self, start: Sequence[int], limit: Sequence[int], strides: Sequence[int] | None) -> Scaled:
        cut = [slice(a, b, c) for a, b, c in zip(start, limit, strides or [1] * len(start), strict=True)]
        shape = tuple(len(range(n)[c]) for n, c in zip(self.shape, cut, strict=True))
        of_ids = tuple(c if n > 1 else slice(None) for c, n in zip(cut, self.ids.shape, strict=True))
        return Scaled(self.ids[of_ids], shape)


def spread(t: Ids, axes: Sequence[int], places: Sequence[int], ndim: int) -> Ids:
    """`t`, constant along all but `axes`, with these at `places` of a value of `ndim` axes."""
    shape = [1] * ndim
    for k, place in zip(axes, places, strict=True):
        shape[place] = t.shape[k]
    return t.reshape(shape)


def varies(ids: Ids, axes: Iterable[int]) -> bool:
    return any(ids.shape[k] > 1 for k in axes)


def known(x: Any) -> Value:
    shape, dtype = np.shape(x), jnp.result_type(x)
    is_real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    return Value(shape, constant=float(x) if shape == () and is_real else None)

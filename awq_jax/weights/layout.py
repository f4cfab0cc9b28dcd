"""How a param of any shape is read: its axes cut into atoms, and which atoms each axis of what is seen merges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

Cuts = tuple[tuple[tuple[str, int], ...], ...]
"""By axis the mesh axes (name, size) that cut it into shards."""


def in_param(stack: tuple[int, ...], axis: int) -> int:
    """Which axis of a param is `axis` of what scans slice from it; `stack` as in Layout."""
    for k in reversed(stack):
        axis += axis >= k
    return axis


def stack_places(stack: tuple[int, ...]) -> tuple[int, ...]:
    """Which axes of a param are its axes of layers, first the one that is sliced first."""
    return tuple(in_param(stack[:depth], k) for depth, k in enumerate(stack))


def one_layer(shape: Sequence[int], stack: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one layer of a param of `shape`; `stack` as in Layout."""
    places = stack_places(stack)
    return tuple(n for k, n in enumerate(shape) if k not in places)


def names_in(cuts: Cuts) -> tuple[str, ...]:
    """The mesh axes of all cuts."""
    return tuple(name for cut in cuts for name, _ in cut)


def pieces(cuts: Cuts) -> tuple[int, ...]:
    """Into how many shards each axis is cut."""
    return tuple(math.prod(size for _, size in cut) for cut in cuts)


@dataclass(frozen=True)
class Layout:
    """How a param of `shape` is seen: axis k of what is seen merges the atoms `axes[k]`.

    An atom (axis of the param, size) is a factor of that axis; those of one axis follow each other, slowest first. What
    a matmul reads has the axes (*lead, i, o). Axes of stacked layers go in front: they are in front in the param too,
    or, with a `stack`, its k-th number is the place of the k-th of them in the param without those before it.
    """

    shape: tuple[int, ...]
    atoms: tuple[tuple[int, int], ...]
    axes: tuple[tuple[int, ...], ...]
    stack: tuple[int, ...] = ()

    @property
    def seen(self) -> tuple[int, ...]:
        """The shape of what is seen."""
        return tuple(math.prod(self.atoms[a][1] for a in axis) for axis in self.axes)

    @property
    def n_lead(self) -> int:
        """How many batch axes (experts) the matrices have."""
        return len(self.axes) - 2

    @property
    def _order(self) -> list[int]:
        return [a for axis in self.axes for a in axis]

    def transpose(self, permutation: Sequence[int]) -> Self:
        return replace(self, axes=tuple(self.axes[p] for p in permutation))

    def squeeze(self, dimensions: Sequence[int]) -> Self | None:
        """None where an axis of one shard would be lost."""
        if any(self.axes[k] for k in dimensions):
            return None
        return replace(self, axes=tuple(a for k, a in enumerate(self.axes) if k not in dimensions))

    def broadcast(self, shape: Sequence[int], dimensions: Sequence[int]) -> Self | None:
        """`lax.broadcast_in_dim` where it only adds axes of size 1; otherwise None."""
        axes = dict(zip(dimensions, self.axes, strict=True))
        new = replace(self, axes=tuple(axes.get(k, ()) for k in range(len(shape))))
        return new if new.seen == tuple(shape) else None

    def reshape(self, shape: Sequence[int]) -> Self | None:
        """None where an atom would have to be cut at a place that is no divisor of it, or one of size 1 placed."""
        if any(n < 2 for _, n in self.atoms):
            return None
        left = [(a, self.atoms[a][1]) for a in reversed(self._order)]
        parts: list[list[int]] = [[] for _ in self.atoms]
        axes: list[list[tuple[int, int]]] = []
        for size in shape:
            axes.append([])
            while size > 1:
                a, n = left.pop()
                part = math.gcd(size, n)
                if part not in (size, n) or part == 1:
                    return None
                axes[-1].append((a, len(parts[a])))
                parts[a].append(part)
                size //= part
                left += [(a, n // part)] if n > part else []
        number = {p: k for k, p in enumerate((a, j) for a, cut in enumerate(parts) for j in range(len(cut)))}
        atoms = tuple((self.atoms[a][0], n) for a, cut in enumerate(parts) for n in cut)
        return replace(self, atoms=atoms, axes=tuple(tuple(number[p] for p in axis) for axis in axes))

    def apply(self, w: Array) -> Array:
        """`w` (*stack, *shape), or with its `stack` axes anywhere, as it is seen."""
        k = w.ndim - len(self.shape)
        w = jnp.moveaxis(w, self.places(k), range(k))
        w = w.reshape(*w.shape[:k], *(n for _, n in self.atoms))
        return w.transpose(*range(k), *(k + a for a in self._order)).reshape(*w.shape[:k], *self.seen)

    def undo(self, seen: Array) -> Array:
        """The inverse of `apply`."""
        k, order = seen.ndim - len(self.axes), self._order
        w = seen.reshape(*seen.shape[:k], *(self.atoms[a][1] for a in order))
        w = w.transpose(*range(k), *(k + int(a) for a in np.argsort(order))).reshape(*w.shape[:k], *self.shape)
        return jnp.moveaxis(w, range(k), self.places(k))

    def param_shape(self, stack: tuple[int, ...]) -> tuple[int, ...]:
        """The param's shape, given the sizes of its axes of layers."""
        layers = dict(zip(self.places(len(stack)), stack, strict=True))
        rest = iter(self.shape)
        return tuple(layers[k] if k in layers else next(rest) for k in range(len(stack) + len(self.shape)))

    def places(self, n: int) -> tuple[int, ...]:
        """Where in the param the `n` axes of layers are; what is sliced from it by a scan lacks the first."""
        more = max(0, n - len(self.stack))
        return (*range(more), *(more + k for k in stack_places(self.stack[len(self.stack) + more - n :])))

    @property
    def _first(self) -> dict[int, int]:
        """By axis of the param its slowest atom."""
        return {axis: a for a, (axis, _) in reversed([*enumerate(self.atoms)])}

    def cut(self, pieces: tuple[int, ...]) -> Self:
        """How one of `pieces[k]` equal pieces along each axis k of `shape` is read."""
        return self._resized(tuple(n // p for n, p in zip(self.shape, pieces, strict=True)))

    def whole(self, pieces: tuple[int, ...]) -> Self:
        """The inverse of `cut`."""
        return self._resized(tuple(n * p for n, p in zip(self.shape, pieces, strict=True)))

    def _resized(self, shape: tuple[int, ...]) -> Self:
        slowest = {a: axis for axis, a in self._first.items() if shape[axis] != self.shape[axis]}
        resized = lambda a, k, n: n * shape[k] // self.shape[k] if a in slowest else n
        return replace(self, shape=shape, atoms=tuple((k, resized(a, k, n)) for a, (k, n) in enumerate(self.atoms)))

    def cuts_of(self, cuts: tuple[tuple[Any, ...], ...]) -> tuple[tuple[Any, ...], ...] | None:
        """What cuts each axis of what is seen, given what cuts each axis of `shape`; () where nothing does.

        None where a piece of the param would be no piece of what is seen.
        """
        leads = {axis[0]: k for k, axis in enumerate(self.axes) if axis}
        found: list[tuple[Any, ...]] = [()] * len(self.axes)
        for axis, cut in enumerate(cuts):
            lead = leads.get(self._first.get(axis, -1))
            if cut and lead is None:
                return None
            if cut and lead is not None:
                found[lead] = cut
        return tuple(found)

    @property
    def is_matrix(self) -> bool:
        """Whether the param already is (*lead, i, o)."""
        one_each = tuple((k,) for k in range(len(self.shape)))
        return self.atoms == tuple(enumerate(self.shape)) and self.axes == one_each and not self.stack

    def as_json(self) -> dict[str, Any]:
        """The layout of matrices, as files have it; `layout_of_json` is the inverse."""
        sizes = tuple(n for _, n in self.atoms)
        in_order = {"order": tuple(self._order), "n_lead": self.n_lead, "n_in": len(self.axes[-2])}
        return {"shape": self.shape, "sizes": sizes, **in_order, "stack": self.stack}


def layout_of_json(
    shape: Sequence[int], sizes: Sequence[int], order: Sequence[int], n_lead: int, n_in: int, stack: Sequence[int] = ()
) -> Layout:
    """The axes of `shape` split into `sizes`, put into `order`: `n_lead` axes, `n_in` that are contracted, the rest."""
    atoms, k = [], 0
    for axis, n in enumerate(shape):
        left = n
        while k < len(sizes) and (left > 1 or (left == n == sizes[k] == 1 and (axis, 1) not in atoms)):
            atoms.append((axis, sizes[k]))
            left, k = left // max(sizes[k], 1), k + 1
    atoms += [(len(shape), n) for n in sizes[k:]]
    axes = (*((a,) for a in order[:n_lead]), tuple(order[n_lead : n_lead + n_in]), tuple(order[n_lead + n_in :]))
    return Layout(tuple(shape), tuple(atoms), axes, tuple(stack))

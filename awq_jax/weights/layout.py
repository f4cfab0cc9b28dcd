"""A param seen through transposes and reshapes, as bookkeeping: nothing is moved until a matmul asks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Array

from awq_jax.weights.tensor import Layout

Cuts = tuple[tuple[tuple[str, int], ...], ...]
"""By axis the mesh axes (name, size) that cut it into shards."""


@dataclass(frozen=True)
class View:
    """An array of shape `base` cut into atoms of `sizes` (none is 1), of which each axis merges `axes[k]`.

    Where a param is sliced layer by layer, `base` is one slice; `stack` says where its axes of layers were, as in
    Layout, and `picks` which layer each of them gave: None where a scan takes one after the other. Inside a shard_map
    `base` is one shard, and `cuts` tells for each of its axes what cut it; an axis that is cut to size 1 is an atom.
    """

    base: tuple[int, ...]
    sizes: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    stack: tuple[int, ...] = ()
    picks: tuple[int | None, ...] = ()
    cuts: Cuts = ()

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        stack: tuple[int, ...] = (),
        picks: tuple[int | None, ...] = (),
        cuts: Cuts = (),
    ) -> View:
        atoms = iter(range(len(shape)))
        is_atom = [n != 1 or bool(cut) for n, cut in zip(shape, cuts or ((),) * len(shape), strict=True)]
        axes = tuple((next(atoms),) if atom else () for atom in is_atom)
        sizes = tuple(n for n, atom in zip(shape, is_atom, strict=True) if atom)
        return cls(tuple(shape), sizes, axes, stack, picks, cuts)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[a] for a in axis) for axis in self.axes)

    def transpose(self, permutation: Sequence[int]) -> View:
        return replace(self, axes=tuple(self.axes[p] for p in permutation))

    def squeeze(self, dimensions: Sequence[int]) -> View | None:
        """None where an axis of one shard would be lost."""
        if any(self.axes[k] for k in dimensions):
            return None
        return replace(self, axes=tuple(a for k, a in enumerate(self.axes) if k not in dimensions))

    def broadcast(self, shape: Sequence[int], dimensions: Sequence[int]) -> View | None:
        """`lax.broadcast_in_dim` where it only adds axes of size 1; otherwise None."""
        axes = dict(zip(dimensions, self.axes, strict=True))
        new = replace(self, axes=tuple(axes.get(k, ()) for k in range(len(shape))))
        return new if new.shape == tuple(shape) else None

    def reshape(self, shape: Sequence[int]) -> View | None:
        """None where an atom would have to be cut at a place that is no divisor of it, or one of size 1 placed."""
        if 1 in self.sizes:
            return None
        queue = [[a, self.sizes[a]] for axis in self.axes for a in axis]
        pieces: dict[int, list[int]] = {}
        axes: list[list[tuple[int, int]]] = []
        for size in shape:
            axis: list[tuple[int, int]] = []
            while size > 1:
                atom, left = queue[0]
                part = math.gcd(size, left) if size % left and left % size else min(size, left)
                if part in (0, 1) or size % part or left % part:
                    return None
                pieces.setdefault(atom, []).append(part)
                axis.append((atom, len(pieces[atom]) - 1))
                size //= part
                queue[0][1] = left // part
                if queue[0][1] == 1:
                    queue.pop(0)
            axes.append(axis)
        number: dict[tuple[int, int], int] = {}
        sizes: list[int] = []
        for atom, whole in enumerate(self.sizes):
            for k, part in enumerate(pieces.get(atom, [whole])):
                number[atom, k] = len(sizes)
                sizes.append(part)
        return replace(self, sizes=tuple(sizes), axes=tuple(tuple(number[p] for p in axis) for axis in axes))

    @property
    def layers(self) -> int | None:
        """Which axis of the base is the view's first, if all others are as they are in the base; else None."""
        whole = [k for k in range(len(self.base)) if not (self.cuts and self.cuts[k])]
        return next((k for k in whole if self == self._untouched._first(k)), None)

    @property
    def _untouched(self) -> View:
        return View.of(self.base, self.stack, self.picks, self.cuts)

    def _first(self, axis: int) -> View:
        return self.transpose([axis, *(k for k in range(len(self.axes)) if k != axis)])

    @property
    def slice(self) -> View:
        """What a scan sees of the view, one layer after the other; `layers` must not be None."""
        assert self.layers is not None
        return self._without(self.layers, None)

    def _without(self, axis: int, pick: int | None) -> View:
        rest = self.base[:axis] + self.base[axis + 1 :]
        return View.of(rest, (*self.stack, axis), (*self.picks, pick), self.cuts[:axis] + self.cuts[axis + 1 :])

    def pick(self, start: Sequence[int], limit: Sequence[int], strides: Sequence[int] | None) -> View | None:
        """`lax.slice` where it takes one layer, or one of several axes, of a param that nothing has changed yet."""
        cut = [k for k, n in enumerate(self.shape) if (start[k], limit[k]) != (0, n)]
        if not 0 < len(cut) < len(self.base) or self != self._untouched or any(n != 1 for n in strides or ()):
            return None
        if any(limit[k] != start[k] + 1 or (self.cuts and self.cuts[k]) for k in cut):
            return None
        view = self
        for n, k in enumerate(cut):
            view = view._without(k - n, int(start[k]))
        left = iter(view.axes)
        return replace(view, axes=tuple(() if k in cut else next(left) for k in range(len(self.axes))))

    def shard(self, cuts: Cuts) -> View | None:
        """What a shard_map sees of a param that nothing has changed yet; None of another."""
        if not any(cuts):
            return self
        if self != self._untouched or self.cuts:
            return None
        shard = tuple(n // p for n, p in zip(self.base, pieces(cuts), strict=True))
        return View.of(shard, self.stack, self.picks, cuts)

    def gather(self, axis: int, names: Sequence[str]) -> View | None:
        """What `lax.all_gather` along an axis makes of a shard that nothing has changed yet; None of another."""
        if self != self._untouched or not self.cuts or names_in(self.cuts[axis : axis + 1]) != tuple(names):
            return None
        whole = (*self.base[:axis], self.base[axis] * pieces(self.cuts)[axis], *self.base[axis + 1 :])
        return View.of(whole, self.stack, self.picks, (*self.cuts[:axis], (), *self.cuts[axis + 1 :]))

    def matrix_cuts(self, layout: Layout) -> Cuts | None:
        """What cuts each axis of the matrix (*lead, i, o); None where a shard is no part of it in one piece."""
        return layout.in_matrix(self.cuts or ((),) * len(self.base))

    def whole(self, layout: Layout) -> Layout:
        """How the param is read of which a shard is read by `layout`."""
        return layout.whole(pieces(self.cuts)) if self.cuts else layout

    def layout(self, batch: Sequence[int], contracted: Sequence[int]) -> Layout:
        """How a matmul over `contracted` axes, batched over `batch`, reads the base array."""
        free = [k for k in range(len(self.axes)) if k not in batch and k not in contracted]
        lead, inputs, outputs = ([a for k in ks for a in self.axes[k]] for ks in (batch, contracted, free))
        stack = self.stack if any(self.stack) else ()
        return Layout(self.base, self.sizes, (*lead, *inputs, *outputs), len(lead), len(inputs), stack)

    def apply(self, base: Array) -> Array:
        """`base` (*stack, *shape) as this view shows it."""
        stack = base.shape[: base.ndim - len(self.base)]
        k = len(stack)
        order = [k + a for axis in self.axes for a in axis]
        split = base.reshape((*stack, *self.sizes))
        return split.transpose((*range(k), *order)).reshape((*stack, *self.shape))


def names_in(cuts: Cuts) -> tuple[str, ...]:
    """The mesh axes of all cuts."""
    return tuple(name for cut in cuts for name, _ in cut)


def pieces(cuts: Cuts) -> tuple[int, ...]:
    """Into how many shards each axis is cut."""
    return tuple(math.prod(size for _, size in cut) for cut in cuts)


STRUCTURAL = {
    "transpose": lambda view, p: view.transpose(p["permutation"]),
    "reshape": lambda view, p: view.reshape(p["new_sizes"]) if p.get("dimensions") is None else None,
    "squeeze": lambda view, p: view.squeeze(p["dimensions"]),
    "broadcast_in_dim": lambda view, p: view.broadcast(p["shape"], p["broadcast_dimensions"]),
    "convert_element_type": lambda view, p: view,
    "slice": lambda view, p: view.pick(p["start_indices"], p["limit_indices"], p["strides"]),
    "copy": lambda view, p: view,
    "copy_p": lambda view, p: view,
    "pvary": lambda view, p: view,
    "name": lambda view, p: view,
    "reshard": lambda view, p: view,
    "sharding_constraint": lambda view, p: view,
}
"""What each primitive that only rearranges does to a view: `(view, params) -> View`, None where it does more."""


def is_grouped_by_rows(numbers: Any) -> bool:
    """Whether a ragged_dot_general is `lax.ragged_dot`: sorted rows (m, k), each times its group's matrix."""
    (cx, cw), batch = numbers.dot_dimension_numbers
    of_rows = (tuple(cx), tuple(numbers.lhs_ragged_dimensions)) == ((1,), (0,))
    return of_rows and len(cw) == len(numbers.rhs_group_dimensions) == 1 and not any(batch)


def is_pointwise(p: Mapping[str, Any], kernel: Sequence[int]) -> bool:
    """Whether a conv_general_dilated with these params is a matmul at every place: 1 x 1, no padding, one group."""
    spatial = [kernel[k] for k in p["dimension_numbers"].rhs_spec[2:]]
    spread = any(n != 1 for n in (*spatial, *p["lhs_dilation"], p["feature_group_count"], p["batch_group_count"]))
    return not spread and not any(n for pads in p["padding"] for n in pads)


def pointwise_slices(p: Mapping[str, Any]) -> tuple[slice, ...]:
    """Which places of the input such a convolution reads."""
    spatial = dict(zip(p["dimension_numbers"].lhs_spec[2:], p["window_strides"], strict=True))
    return tuple(slice(None, None, spatial.get(k, 1)) for k in range(len(spatial) + 2))

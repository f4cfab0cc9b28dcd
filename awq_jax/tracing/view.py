"""A param seen through transposes and reshapes, as bookkeeping: nothing is moved until a matmul asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from awq_jax.weights.layout import Cuts, Layout, names_in, pieces


@dataclass(frozen=True)
class View(Layout):
    """How a param, a layer or a shard of it is seen by the traced function.

    Where a param is sliced layer by layer, `shape` is that of one slice; `stack` says where its axes of layers were,
    and `picks` which layer each of them gave: None where a scan takes one after the other. Inside a shard_map `shape`
    is that of one shard, and `cuts` tells for each of its axes what cut it; an axis that is cut to size 1 is an atom.
    """

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
        atoms = tuple((k, n) for k, n in enumerate(shape) if n != 1 or (cuts and cuts[k]))
        number = {k: (a,) for a, (k, _) in enumerate(atoms)}
        return cls(tuple(shape), atoms, tuple(number.get(k, ()) for k in range(len(shape))), stack, picks, cuts)

    @property
    def layers(self) -> int | None:
        """Which axis of the param is the view's first, if all others are as they are in the param; else None."""
        whole = [k for k in range(len(self.shape)) if not (self.cuts and self.cuts[k])]
        return next((k for k in whole if self == self._untouched._in_front(k)), None)

    @property
    def _untouched(self) -> View:
        return View.of(self.shape, self.stack, self.picks, self.cuts)

    def _in_front(self, axis: int) -> View:
        return self.transpose([axis, *(k for k in range(len(self.axes)) if k != axis)])

    @property
    def slice(self) -> View:
        """What a scan sees of the view, one layer after the other; `layers` must not be None."""
        assert self.layers is not None
        return self._without(self.layers, None)

    def _without(self, axis: int, pick: int | None) -> View:
        rest = self.shape[:axis] + self.shape[axis + 1 :]
        return View.of(rest, (*self.stack, axis), (*self.picks, pick), self.cuts[:axis] + self.cuts[axis + 1 :])

    def pick(self, start: Sequence[int], limit: Sequence[int], strides: Sequence[int] | None) -> View | None:
        """`lax.slice` where it takes one layer, or one of several axes, of a param that nothing has changed yet."""
        cut = [k for k, n in enumerate(self.seen) if (start[k], limit[k]) != (0, n)]
        if not 0 < len(cut) < len(self.shape) or self != self._untouched or any(n != 1 for n in strides or ()):
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
        shard = tuple(n // p for n, p in zip(self.shape, pieces(cuts), strict=True))
        return View.of(shard, self.stack, self.picks, cuts)

    def gather(self, axis: int, names: Sequence[str]) -> View | None:
        """What `lax.all_gather` along an axis makes of a shard that nothing has changed yet; None of another."""
        if self != self._untouched or not self.cuts or names_in(self.cuts[axis : axis + 1]) != tuple(names):
            return None
        whole = (*self.shape[:axis], self.shape[axis] * pieces(self.cuts)[axis], *self.shape[axis + 1 :])
        return View.of(whole, self.stack, self.picks, (*self.cuts[:axis], (), *self.cuts[axis + 1 :]))

    def layout(self, batch: Sequence[int], contracted: Sequence[int]) -> Layout:
        """How a matmul over `contracted` axes, batched over `batch`, reads the param."""
        free = [k for k in range(len(self.axes)) if k not in batch and k not in contracted]
        lead, inputs, outputs = (tuple(a for k in ks for a in self.axes[k]) for ks in (batch, contracted, free))
        stack = self.stack if any(self.stack) else ()
        return Layout(self.shape, self.atoms, (*((a,) for a in lead), inputs, outputs), stack)

    def matrix_cuts(self, layout: Layout) -> Cuts | None:
        """What cuts each axis of the matrix (*lead, i, o); None where a shard is no part of it in one piece."""
        return layout.cuts_of(self.cuts or ((),) * len(self.shape))

    def of_param(self, layout: Layout) -> Layout:
        """How the param is read of which a shard is read by `layout`."""
        return layout.whole(pieces(self.cuts)) if self.cuts else layout

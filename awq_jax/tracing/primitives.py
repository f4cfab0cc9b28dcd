"""The one file that reads the params of jax's primitives: those that rearrange, those that multiply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from awq_jax.compat import COPIES


def body_of_call(p: Mapping[str, Any]) -> Any:
    """The jaxpr that a call runs."""
    return p.get("jaxpr") or p["call_jaxpr"]


STRUCTURAL = {
    "transpose": lambda a, p: a.transpose(p["permutation"]),
    "reshape": lambda a, p: a.reshape(p["new_sizes"]) if p.get("dimensions") is None else None,
    "squeeze": lambda a, p: a.squeeze(p["dimensions"]),
    "broadcast_in_dim": lambda a, p: a.broadcast(p["shape"], p["broadcast_dimensions"]),
    "slice": lambda a, p: a.pick(p["start_indices"], p["limit_indices"], p["strides"]),
    "convert_element_type": lambda a, p: a,
    **dict.fromkeys(COPIES, lambda a, p: a),
    "pvary": lambda a, p: a,
    "name": lambda a, p: a,
    "reshard": lambda a, p: a,
    "sharding_constraint": lambda a, p: a,
}
"""What each primitive that only rearranges does: `(seen, params) -> seen`, None where it does more.

What is seen has the methods transpose, reshape, squeeze, broadcast and pick: a View, or the Scaled ids of a value.
A primitive that is none of these means nothing to who follows params or scales: there is no other place to add it.
"""


@dataclass(frozen=True)
class Matmul:
    """A matmul of rows x (*batch, *tokens, *contracted) with matrices w (*batch, *contracted, *free).

    Args:
      w: which operand is the matrices; x is the other of the first two.
      batch, tokens, contracted: axes of x; batch is empty where rows are `grouped`.
      w_batch, w_contracted, w_free: axes of w.
      order: of the axes of (*batch, *tokens, *free) in the result.
      places: what of x is read; empty for all.
      grouped: x has sorted rows, each of which reads the matrix of its group; the third operand counts them.
    """

    w: int
    batch: tuple[int, ...]
    tokens: tuple[int, ...]
    contracted: tuple[int, ...]
    w_batch: tuple[int, ...]
    w_contracted: tuple[int, ...]
    w_free: tuple[int, ...]
    order: tuple[int, ...]
    places: tuple[slice, ...] = ()
    grouped: bool = False

    def rows(self, x: Any) -> Any:
        """x as (*batch, *tokens, *contracted)."""
        read = x[self.places] if self.places else x
        return read.transpose(*self.batch, *self.tokens, *self.contracted)

    def matrices(self, w: Any) -> Any:
        """w as (*batch, *free, *contracted); its other axes have size 1."""
        used = (*self.w_batch, *self.w_free, *self.w_contracted)
        moved = w.transpose(*used, *_others(w.ndim, used))
        return moved.reshape(moved.shape[: len(used)])


def matmul(name: str, p: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], w: int = 1) -> Matmul | None:
    """The matmul that an equation is if its operand `w` holds the matrices; None where it is none.

    Args:
      shapes: of the operands.
    """
    return MATMULS[name](p, shapes, w) if name in MATMULS and w in (0, 1) else None


def _others(n: int, *axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(k for k in range(n) if not any(k in some for some in axes))


def _dot(p: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], w: int) -> Matmul:
    contracted, batch = (tuple(map(tuple, axes)) for axes in p["dimension_numbers"])
    tokens, free = (_others(len(shapes[k]), contracted[k], batch[k]) for k in (1 - w, w))
    n_batch, n_tokens, n_free = len(batch[0]), len(tokens), len(free)
    order = [*range(n_batch + n_tokens + n_free)]
    if w == 0:
        order = [*order[:n_batch], *order[n_batch + n_tokens :], *order[n_batch : n_batch + n_tokens]]
    x = 1 - w
    return Matmul(w, batch[x], tokens, contracted[x], batch[w], contracted[w], free, tuple(order))


def _ragged_dot(p: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], w: int) -> Matmul | None:
    """`lax.ragged_dot`: sorted rows (m, k), each times its group's matrix."""
    numbers = p["ragged_dot_dimension_numbers"]
    (cx, cw), batch = (tuple(map(tuple, axes)) for axes in numbers.dot_dimension_numbers)
    groups = tuple(numbers.rhs_group_dimensions)
    of_rows = (cx, tuple(numbers.lhs_ragged_dimensions)) == ((1,), (0,))
    if w != 1 or not of_rows or not len(cw) == len(groups) == 1 or any(batch):
        return None
    return Matmul(w, (), (0,), cx, groups, cw, _others(3, cw, groups), (0, 1), grouped=True)


def _convolution(p: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], w: int) -> Matmul | None:
    """A matmul at every place: 1 x 1, no padding, one group."""
    of_x, of_w, of_out = p["dimension_numbers"]
    kernel = [shapes[1][k] for k in of_w[2:]]
    spread = any(n != 1 for n in (*kernel, *p["lhs_dilation"], p["feature_group_count"], p["batch_group_count"]))
    if w != 1 or spread or any(n for pads in p["padding"] for n in pads):
        return None
    strides = dict(zip(of_x[2:], p["window_strides"], strict=True))
    places = tuple(slice(None, None, strides.get(k, 1)) for k in range(len(of_x)))
    found = (0, len(of_x) - 1, *range(1, len(of_x) - 1))
    order = tuple(found[of_out.index(k)] for k in range(len(of_x)))
    return Matmul(w, (), (of_x[0], *of_x[2:]), (of_x[1],), (), (of_w[1],), (of_w[0],), order, places)


MATMULS = {"dot_general": _dot, "ragged_dot_general": _ragged_dot, "conv_general_dilated": _convolution}
"""What each primitive that multiplies is as a Matmul: `(params, shapes, w) -> Matmul`, None where it does more."""

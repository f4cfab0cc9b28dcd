"""A call's arguments: the arrays among them, and what stands around these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from awq_jax.errors import InputError


class _Array:
    """What stands for an array among arguments."""

    def __repr__(self) -> str:
        return "array"


ARRAY = _Array()


@dataclass(frozen=True)
class Around:
    """Arguments without their arrays.

    Args:
      tree: of (positional, by name).
      leaves: ARRAY, or what is no array: numbers, truth values, None.
    """

    tree: Any
    leaves: list[Any]

    def filled(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional arguments and those by name, with arrays in their places."""
        left = iter(arrays)
        return jax.tree.unflatten(self.tree, [next(left) if x is ARRAY else x for x in self.leaves])

    @property
    def plain(self) -> dict[str, Any]:
        """The arguments by name that hold no array."""
        _, named = self.filled([ARRAY] * self.leaves.count(ARRAY))
        return {name: x for name, x in named.items() if ARRAY not in jax.tree.leaves(x)}

    def __str__(self) -> str:
        args, named = self.filled([ARRAY] * self.leaves.count(ARRAY))
        return f"({', '.join([*map(repr, args), *(f'{name}={x!r}' for name, x in named.items())])})"


def split(args: Sequence[Any], named: Mapping[str, Any]) -> tuple[list[Any], Around]:
    """The arrays among arguments, torch's tensors too, and what is around them."""
    leaves, tree = jax.tree.flatten((tuple(args), dict(named)), is_leaf=lambda x: x is None)
    is_array = lambda x: hasattr(x, "shape") and hasattr(x, "dtype")
    return [x for x in leaves if is_array(x)], Around(tree, [ARRAY if is_array(x) else x for x in leaves])


def as_traced(k: int, x: Any, dtype: np.dtype) -> Array:
    """An array of the dtype that was traced; integers may be of any.

    Raises:
      InputError: input k is of another.
    """
    x = jnp.asarray(x)
    if x.dtype != dtype and not all(jnp.issubdtype(d, jnp.integer) for d in (x.dtype, dtype)):
        raise InputError(f"Input {k} is of {x.dtype}: the module was traced for {dtype}; bring it to that.")
    return x.astype(dtype)


def arrays_only(out: Any, is_array: Callable[[Any], bool]) -> Any:
    """Outputs with dicts in place of mappings, and without what is not made of arrays."""
    if is_array(out):
        return out
    if isinstance(out, Mapping):
        found = {str(name): arrays_only(part, is_array) for name, part in out.items()}
        return {name: part for name, part in found.items() if part is not None}
    if isinstance(out, list | tuple):
        return tuple(arrays_only(part, is_array) for part in out)
    return None

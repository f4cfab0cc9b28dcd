"""The table: a JAX function for each of torch's operations, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Operation:
    """How an operation is run.

    Args:
      run: takes what torch's schemas have, of all overloads that it is for, in their order and under their names:
        arrays for tensors, jax dtypes for dtypes;
        without devices, layouts and memory formats. Raises NotImplementedError for what it does not do.
      promotes: whether torch brings all its tensors to one dtype first; `run` then gets them so.
    """

    run: Callable[..., Any]
    promotes: bool = False


TABLE: dict[str, Operation] = {}
"""By name, or by name and overload where overloads are no one function: "add", "max.dim", "mm.default"."""


def operation(*names: str, promotes: bool = False) -> Callable[[F], F]:
    """Puts a function into the table.

    Args:
      names: of the operation, with its namespace unless that is aten, for all its overloads; or of one of these.
      promotes: see `Operation`.

    Example:
      >>> @operation("mine::double")
      ... def double(x):
      ...     return 2 * x
    """

    def put(function: F) -> F:
        TABLE.update(dict.fromkeys(names, Operation(function, promotes)))
        return function

    return put


def find(key: str) -> Operation | None:
    """The entry of "NAME.OVERLOAD"; None if the table has none."""
    return TABLE.get(key) or TABLE.get(key.rsplit(".", 1)[0])

"""What segments do, apart from which params they do it with: equal ones share one compiled function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
from jaxtyping import Array

from awq_jax.tracing.flat import Atom, Constant, Operation, Param, Seen, Value, evaluate
from awq_jax.tracing.sites import Traced, sites


def slot(k: int) -> str:
    """What a program calls its k-th param."""
    return f"<{k}>"


@dataclass(frozen=True, eq=False)
class Program:
    """What equal segments run.

    Args:
      fn: `({slot: param}, *reads) -> [*passed on, *outputs of the function]`.
      params, reads: shapes and dtypes.
      passed: how many of the results later segments read.
    """

    fn: Callable[..., list[Array]]
    params: dict[str, jax.ShapeDtypeStruct]
    reads: tuple[jax.ShapeDtypeStruct, ...]
    passed: int

    @cached_property
    def traced(self) -> Traced:
        """Its sites and folds, params called by slot, as if nothing else read them."""
        return sites(self.fn, self.params, *self.reads)


class Names:
    """What a program calls its values, in the order in which they are met."""

    def __init__(self, made: set[Value]):
        self._made, self._named = made, dict[Value, str]()
        self._slots: dict[Param, int] = {}
        self._stored: dict[Value, Seen] = {}
        self._reads: list[Value] = []

    def __call__(self, v: Atom) -> str:
        if isinstance(v, Constant):
            return v.text
        if v not in self._named:
            self._named[v] = self._new(v)
        return self._named[v]

    def _new(self, v: Value) -> str:
        if v in self._made:
            return f"v{len(self._named)}"
        if v.is_read and v.seen:
            self._stored[v] = v.seen
            k = self._slots.setdefault(v.seen.param, len(self._slots))
            return f"p{k} {v.seen.view.shape} {v.seen.dtypes} {v.aval}"
        self._reads.append(v)
        return f"x{len(self._reads)} {v.aval}"

    @property
    def params(self) -> tuple[Param, ...]:
        return tuple(self._slots)

    @property
    def reads(self) -> tuple[Value, ...]:
        return tuple(self._reads)

    @property
    def stored(self) -> list[tuple[Value, Seen, str]]:
        """What is read of params, and the slots of these."""
        return [(v, seen, slot(self._slots[seen.param])) for v, seen in self._stored.items()]


def written(operations: Sequence[Operation], writes: Sequence[Value], passed: int) -> tuple[str, Names]:
    """A text that is the same for operations that do the same with other params, and what it calls its values."""
    names = Names({v for o in operations for v in o.outs})
    lines = [f"{o.text} {[*map(names, o.ins)]} {[(names(v), v.aval) for v in o.outs]}" for o in operations]
    return "\n".join([*lines, f"{[*map(names, writes)]} {passed}"]), names


def program(operations: Sequence[Operation], names: Names, writes: Sequence[Value], passed: int) -> Program:
    stored, reads = names.stored, names.reads

    def fn(params: Mapping[str, Array], *live: Array) -> list[Array]:
        known = {v: v.of_stored(params[name]) for v, _, name in stored}
        return evaluate(operations, writes, known | dict(zip(reads, live, strict=True)))

    params = {name: jax.ShapeDtypeStruct(seen.view.shape, seen.dtypes[0]) for _, seen, name in stored}
    return Program(fn, params, tuple(v.aval for v in reads), passed)

"""The blocks of any function, found by tracing: pieces that run one after the other, each with its own few params.

The function is traced with shapes alone and flattened (flat.py). What depends on its inputs is *live*: it goes from
piece to piece. What depends on params or constants alone is computed again in each piece that needs it. Between two
reads of a param lies a place where the fewest bytes are live; where that is a minimum among its neighbours, as in the
residual stream between two layers, the function is cut. A cut that separates params of one fold, or two matmuls with
one param, is given up while memory allows.

Pieces that do the same with other params are one *program*: traced, analysed and compiled once. A model of 80 equal
layers has four or so.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import jax
import numpy as np

from awq_jax.memory import nbytes_of
from awq_jax.tracing.flat import Atom, Flat, Operation, Param, Value, flatten, needed
from awq_jax.tracing.program import Program, program, slot, written
from awq_jax.tracing.sites import Traced, trace
from awq_jax.weights.layout import stack_places
from awq_jax.weights.paths import named_leaves

ALIKE = 0.1
"""Numbers of live bytes that differ by less are one floor when minima are looked for."""
LARGER = 2
"""How many times the bytes of the largest piece pieces that are joined may have."""


@dataclass(frozen=True, eq=False)
class Segment:
    """A piece of a function.

    Args:
      span: which live operations it has, the end not among them.
      params: in the order of the program's slots.
      reads, writes: of what is live, in the order of the program's arguments and results.
      traced: the program's sites and folds, but for those that other segments are in the way of.
      owned: the params that are finished when it is.
      live: bytes that later segments or the caller read, when it has run.
    """

    program: Program
    span: tuple[int, int]
    params: tuple[Param, ...]
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    traced: Traced
    owned: frozenset[Param] = frozenset()
    live: int = 0

    @property
    def nbytes(self) -> int:
        """Of its params."""
        return nbytes_of(self.program.params.values())

    @property
    def sites(self) -> list[Param]:
        return [param for k, param in enumerate(self.params) if slot(k) in self.traced.sites]

    def __str__(self) -> str:
        names = ", ".join(map(str, self.params))
        return f"{self.nbytes / 1e6:.1f} MB of params ({names}); {self.live / 1e6:.1f} MB live after it"


@dataclass(frozen=True, eq=False)
class Segments:
    """A function in pieces: from `inputs` to `outputs`; `unread` are params that nothing reads.

    `reading` counts for each segment the operations that read params until its end.
    """

    segments: tuple[Segment, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Atom, ...]
    unread: tuple[str, ...]
    reading: tuple[int, ...]

    @property
    def programs(self) -> list[Program]:
        return list({id(s.program): s.program for s in self.segments}.values())

    def __str__(self) -> str:
        """A line a segment."""
        number = {id(program): k for k, program in enumerate(self.programs)}
        return "\n".join(f"program {number[id(s.program)]}: {s}" for s in self.segments)


def segments(fn: Callable[..., Any], params: Any, *inputs: Any, like: Segments | None = None) -> Segments:
    """The pieces of `fn(params, *inputs)`.

    Args:
      fn: any traceable function of a params pytree and arrays.
      params: arrays, ShapeDtypeStructs or anything with a shape and dtype; nothing is computed with them.
      inputs: arrays or ShapeDtypeStructs.
      like: segments of the same function with inputs of other shapes; it is cut at the same places.

    Raises:
      ValueError: a function that looks at values, or that does other things with inputs of other shapes.
    """
    leaves = {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in named_leaves(params).items()}
    abstract = jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))
    jaxpr, _ = trace(fn, abstract, inputs)
    flat = flatten(jaxpr, list(leaves))
    if whole := _not_by_layers(flat, leaves):
        flat = flatten(jaxpr, list(leaves), whole)
    pieces = _Pieces(flat)
    found = _cut(pieces) if like is None else _cut_like(pieces, like)
    read = {param.name for s in found for param in s.params}
    unread = tuple(name for name in leaves if name not in read)
    reading = tuple(sum(k < s.span[1] for k in pieces.reading) for s in found)
    return Segments(found, flat.inputs, flat.outputs, unread, reading)


def _cut(pieces: _Pieces) -> tuple[Segment, ...]:
    return _apart(_joined(pieces, [pieces.segment(a, b) for a, b in pieces.spans()]))


def _cut_like(pieces: _Pieces, like: Segments) -> tuple[Segment, ...]:
    found = tuple(pieces.segment(a, b) for a, b in pieces.spans_like(like.reading))
    if [_sequence(s) for s in found] != [_sequence(s) for s in like.segments]:
        raise ValueError("The function does other things with inputs of other shapes: give batches of one shape.")
    return found


def _sequence(s: Segment) -> tuple[Any, ...]:
    """What segments of one function with inputs of other shapes have in common."""
    return s.params, len(s.reads), len(s.writes), s.program.passed


def _not_by_layers(flat: Flat, leaves: Mapping[str, Any]) -> set[str]:
    """Params that are read as a whole too, or of which some layers are not read."""
    read: dict[str, set[Param]] = {}
    for v in (v for operation in needed(flat.operations, flat.outputs) for v in operation.values):
        if v.is_read and v.seen:
            read.setdefault(v.seen.param.name, set()).add(v.seen.param)
    one = {name: next(iter(params)) for name, params in read.items()}
    layers = {name: math.prod(leaves[name].shape[k] for k in stack_places(p.stack)) for name, p in one.items()}
    return {
        name
        for name, params in read.items()
        if len(params) != layers[name] or any(p.stack != one[name].stack for p in params)
    }


class _Pieces:
    """Makes segments of spans of a function's live operations; those alike share their program."""

    def __init__(self, flat: Flat):
        operations = needed(flat.operations, flat.outputs, effects=True)
        is_live = lambda operation: any(v.live for v in (*operation.values, *operation.outs))
        self.body = [operation for operation in operations if is_live(operation)]
        self.maker = {v: operation for operation in operations for v in operation.outs if not v.live}
        self.outputs = list(dict.fromkeys(v for v in flat.outputs if isinstance(v, Value) and v.live))
        self.last = {v: k for k, operation in enumerate(self.body) for v in operation.values if v.live}
        self.behind = _params_behind(operations)
        seen = (v.seen for o in operations for v in o.values if v.is_read and v.seen)
        self.matrices = {s.param for s in seen if len(s.view.shape) > 1}
        self.reading = [k for k, operation in enumerate(self.body) if self.params(operation)]
        self.programs: dict[str, Program] = {}
        self.live = self.live_bytes(flat.inputs)

    def live_bytes(self, inputs: Iterable[Value]) -> np.ndarray:
        """How many bytes are live after each operation."""
        changes = np.zeros(len(self.body) + 2, np.int64)
        until = self.last | dict.fromkeys(self.outputs, len(self.body))
        born = dict.fromkeys(inputs, -1) | {v: k for k, o in enumerate(self.body) for v in o.outs}
        for v, end in until.items():
            changes[born[v] + 1] += v.nbytes
            changes[end + 1] -= v.nbytes
        return np.cumsum(changes)[1:]

    def params(self, operation: Operation) -> frozenset[Param]:
        """What an operation reads, or what it reads is computed from."""
        return _params_of(operation, self.behind)

    def spans(self) -> list[tuple[int, int]]:
        """The function cut where the fewest bytes are live, so that each piece reads a matrix."""
        places = self.places()
        low = [places[k] for k in minima([int(self.live[k]) for k in places])]
        matrices = [k for k, o in enumerate(self.body) if self.params(o) & self.matrices]
        cuts = [0]
        for k in low:
            if any(cuts[-1] <= m <= k for m in matrices) and any(m > k for m in matrices):
                cuts.append(k + 1)
        return list(pairwise([*cuts, len(self.body)]))

    def spans_like(self, reading: Sequence[int]) -> list[tuple[int, int]]:
        """The function cut after as many operations that read params."""
        places = self.places()
        cuts = [places[n - 1] + 1 for n in reading[:-1] if n <= len(places)]
        return list(pairwise([0, *cuts, len(self.body)]))

    def places(self) -> list[int]:
        """Between each operation that reads params and the next, the one after which the fewest bytes are live."""
        return [min(range(a, b), key=lambda k: (self.live[k], k)) for a, b in pairwise(self.reading)]

    def segment(self, start: int, stop: int) -> Segment:
        body = self.body[start:stop]
        made = [v for operation in body for v in operation.outs]
        passed = [v for v in made if self.last.get(v, -1) >= stop]
        writes = [*passed, *(v for v in self.outputs if v in set(made) - set(passed))]
        text, names = written(order := self.ordered(body), writes, len(passed))
        key = hashlib.sha256(text.encode()).hexdigest()
        if key not in self.programs:
            self.programs[key] = program(order, names, writes, len(passed))
        own, live = self.programs[key], int(self.live[stop - 1]) if body else 0
        return Segment(own, (start, stop), names.params, names.reads, tuple(writes), own.traced, live=live)

    def ordered(self, body: Iterable[Operation]) -> list[Operation]:
        """`body`, what it needs of params and constants computed just before."""
        order: dict[Operation, None] = {}
        for operation in body:
            todo = [operation]
            while todo:
                makers = (self.maker[v] for v in todo[-1].values if v in self.maker)
                if missing := next((o for o in makers if o not in order), None):
                    todo.append(missing)
                else:
                    order[todo.pop()] = None
        return list(order)


Behind = dict[Value, frozenset[Param]]


def _params_behind(operations: Iterable[Operation]) -> Behind:
    """The params that each value that inputs do not reach is computed from."""
    behind: Behind = {}
    for operation in operations:
        behind |= {v: frozenset([v.seen.param]) for v in operation.values if v.is_read and v.seen}
        behind |= dict.fromkeys((v for v in operation.outs if not v.live), _params_of(operation, behind))
    return behind


def _params_of(operation: Operation, behind: Behind) -> frozenset[Param]:
    return frozenset[Param]().union(*(behind.get(v, ()) for v in operation.values))


def minima(sizes: Sequence[int]) -> list[int]:
    """Where the sizes are no larger than those before and after that differ; all of a low floor."""
    differ = lambda a, b: abs(a - b) > ALIKE * b
    found = []
    for k, size in enumerate(sizes):
        before = next((s for s in reversed(sizes[:k]) if differ(s, size)), math.inf)
        after = next((s for s in sizes[k + 1 :] if differ(s, size)), math.inf)
        if size <= before and size <= after:
            found.append(k)
    return found


def _joined(pieces: _Pieces, found: list[Segment]) -> list[Segment]:
    """`found`, neighbours made one that share a site or a fold, while memory allows."""
    most = LARGER * max(s.nbytes for s in found)
    union = lambda a, b: pieces.segment(a.span[0], b.span[1])
    out: list[Segment] = []
    while found:
        first = found.pop(0)
        while reach := _reach(first, found):
            if (whole := union(first, found[reach - 1])).nbytes > most:
                break
            first, found = whole, found[reach:]
        if out and (whole := union(out[-1], first)).nbytes <= most and _share_a_fold(out[-1], first, whole):
            out[-1] = whole
        else:
            out.append(first)
    return out


def _reach(first: Segment, rest: list[Segment]) -> int:
    """How many of the segments that follow must be joined for all matmuls with a param to be in one."""
    own = set(first.sites)
    return max((k for k, s in enumerate(rest, 1) if own.intersection(s.sites)), default=0)


def _share_a_fold(left: Segment, right: Segment, whole: Segment) -> bool:
    for fold in whole.program.traced.folds:
        params = {whole.params[_number(m.param)] for m in fold.members}
        if params - set(left.params) and params - set(right.params):
            return True
    return False


def _number(name: str) -> int:
    return int(name[1:-1])


def _apart(found: list[Segment]) -> tuple[Segment, ...]:
    """The segments, each with what is left of its sites and folds beside the others that read its params."""
    readers: dict[Param, list[int]] = {}
    for k, s in enumerate(found):
        for param in s.params:
            readers.setdefault(param, []).append(k)
    owner = {param: max((k for k in ks if param in found[k].sites), default=ks[0]) for param, ks in readers.items()}

    def why(param: Param, k: int) -> str:
        others = [j for j in readers[param] if j != k]
        if any(param in found[j].sites for j in others):
            return "a matmul of another segment"
        uses = [found[j].traced.skipped.get(slot(found[j].params.index(param)), "another segment") for j in others]
        return ", ".join(dict.fromkeys(uses))

    def own(k: int, s: Segment) -> Segment:
        shared = {slot(j): why(p, k) for j, p in enumerate(s.params) if len(readers[p]) > 1}
        owned = frozenset(p for p in s.params if owner[p] == k)
        return replace(s, traced=_beside(s.traced, shared), owned=owned)

    return tuple(own(k, s) for k, s in enumerate(found))


def _beside(traced: Traced, shared: Mapping[str, str]) -> Traced:
    """What is left of sites and folds where others read `shared` params too, by which they are used there."""
    lost = {n: shared[m.param] for f in traced.folds for m in f.members if m.param in shared for n in f.sites}
    kept = tuple(f for f in traced.folds if not any(m.param in shared for m in f.members))
    found = {
        name: replace(
            site,
            kept=f"also used by {shared[name]}" if name in shared and not site.kept else site.kept,
            refused=f"a param of its fold is also used by {lost[name]}" if name in lost else site.refused,
        )
        for name, site in traced.sites.items()
    }
    return Traced(found, kept, traced.skipped)

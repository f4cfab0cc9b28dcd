"""How the interpreter runs a shard_map that a Weight enters: each device multiplies its own shard.

Records must mean what they mean without a shard_map. Where an axis of experts is cut, they are cut like it; along every
other mesh axis each device saw other tokens (the sum is taken) or the same.
"""

from __future__ import annotations

import functools as ft
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from awq_jax.compat import varying
from awq_jax.kernels.partitioning import names_of
from awq_jax.tracing.interpret import OnDots, Products, Records, Weight, bind, dense, evaluate
from awq_jax.weights.layout import names_in
from awq_jax.weights.sharding import as_shard, cuts_of, gathered, leaf_specs
from awq_jax.weights.tensor import is_quantized


def shard_map(eqn: Any, ins: list[Any], on_dots: OnDots) -> tuple[list[Any], Records]:
    p = eqn.params
    weights: dict[int, Weight] = {}
    arrays: dict[int, Any] = {}
    specs: dict[int, Any] = {}
    for k, (x, spec) in enumerate(zip(ins, p["in_specs"], strict=True)):
        one = _shard(x, spec, p["mesh"]) if isinstance(x, Weight) else None
        if one is None or any(one[0].name == w.name and one[0].view != w.view for w in weights.values()):
            arrays[k], specs[k] = dense(x), spec
        else:
            weights[k], specs[k] = one
    split = {name for k in arrays for entry in specs[k] for name in names_of(entry)}
    manual = [name for name in p["mesh"].axis_names if name in p["newly_manual_axes"]]
    of_records: dict[Any, PartitionSpec] = {}

    def on_shard(read: Sequence[Weight], x: Array, sizes: Array | None, dtype: Any) -> Products:
        ys, records = on_dots(read, x, sizes, dtype)
        of_weights = {w.key: w for w in read}
        for key, record in records.items():
            weight = of_weights[key]
            differ = varying(x) if p["check_vma"] else split | set(weight.cuts)
            records[key] = _summed(record, weight, [name for name in manual if name in differ], p["check_vma"])
            outer = next(w for w in weights.values() if w.name == weight.name)
            of_records[key] = _record_spec(weight, len(outer.view.picks), manual)
        return ys, records

    def body(bases: dict[int, Any], arrays: dict[int, Array]) -> tuple[list[Any], Records]:
        shards = {k: replace(w, base=as_shard(bases[k], w.view.cuts)) for k, w in weights.items()}
        outs, records = evaluate(p["jaxpr"], [(shards | arrays)[k] for k in range(len(ins))], on_shard)
        return list(map(dense, outs)), records

    mapped = ft.partial(
        jax.shard_map,
        mesh=p["mesh"],
        in_specs=tuple({k: specs[k] for k in part} for part in (weights, arrays)),
        axis_names=p["newly_manual_axes"],
        check_vma=p["check_vma"],
    )
    args = ({k: w.base for k, w in weights.items()}, arrays)
    out_specs = list(p["out_specs"])
    # The specs of the records are known after a first tracing only.
    jax.eval_shape(mapped(lambda *args: body(*args)[0], out_specs=out_specs), *args)
    return mapped(body, out_specs=(out_specs, of_records))(*args)


def _shard(x: Weight, spec: PartitionSpec, mesh: Any) -> tuple[Weight, Any] | None:
    """The Weight as seen inside, and the specs of its leaves; None where a shard cannot be followed."""
    view = x.view.shard(cuts_of(spec, len(x.view.seen), mesh))
    specs = leaf_specs(x.base, spec, mesh) if is_quantized(x.base) else spec
    return None if view is None or specs is None else (replace(x, view=view), specs)


def _experts(weight: Weight) -> Any:
    return (weight.view.matrix_cuts(weight.read) or ())[:-2]


def _summed(record: Any, weight: Weight, axes: list[str], is_typed: bool) -> Any:
    """A record of all devices along `axes`, those that cut experts apart."""
    axes = [name for name in axes if name not in names_in(_experts(weight))]
    others = tuple(name for name in axes if name not in weight.cuts)
    record = lax.psum(record, others) if others else record
    # Where the param itself is cut all devices saw the same tokens, which only a mean makes known to the types.
    same = tuple(name for name in axes if name in weight.cuts)
    return lax.pmean(record, same) if same and is_typed else record


def _record_spec(weight: Weight, depth: int, manual: list[str]) -> PartitionSpec:
    """How records are cut: (*layers that a scan took inside, *experts, ...)."""
    layers = [None] * weight.view.picks[depth:].count(None)
    experts = (tuple(name for name, _ in cut if name in manual) or None for cut in _experts(weight))
    return PartitionSpec(*layers, *experts)


def all_gather(eqn: Any, ins: list[Any], on_dots: OnDots) -> tuple[list[Any], Records]:
    """A param that is put together before it is used (FSDP): its codes are."""
    (weight,), p = ins, eqn.params
    names, axis = names_of(p["axis_name"]), p["all_gather_dimension"]
    is_tiled = p["tiled"] and p["axis_index_groups"] is None
    view = weight.view.gather(axis, names) if is_tiled else None
    gather: Callable[[Array, int], Array] = lambda a, k: lax.all_gather(a, names, axis=k, tiled=True)
    base = weight.base
    if view is not None:
        base = gathered(base, axis, weight.view.cuts, gather) if is_quantized(base) else gather(base, axis)
    if view is None or base is None:
        return bind(eqn, ins, on_dots)
    return [replace(weight, base=base, view=view)], {}

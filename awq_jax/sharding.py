"""What cuts a param into shards, and how the leaves of the QuantizedTensor in its place are cut alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from awq_jax.tensor import QuantizedTensor, is_quantized
from awq_jax.views import Cuts, pieces

Names = tuple[str, ...]


def names_of(spec: PartitionSpec, ndim: int) -> tuple[Names, ...]:
    """By axis the names of the mesh axes that cut it."""
    return tuple(() if k is None else (k,) if isinstance(k, str) else tuple(k) for k in (*spec, *[None] * ndim))[:ndim]


def cuts_of(spec: PartitionSpec, ndim: int, mesh: Any) -> Cuts:
    """By axis the mesh axes that cut it, and their sizes."""
    return tuple(tuple((name, mesh.shape[name]) for name in names) for names in names_of(spec, ndim))


def leaf_specs(w: QuantizedTensor, spec: PartitionSpec, mesh: Any) -> QuantizedTensor | None:
    """The PartitionSpec of every leaf of `w`, where `spec` is the dense param's.

    None where a shard of the param would be no piece of the leaves: it cuts through a group, through the words of 32
    rows, or an axis that is not the first of those merged into the input or the output axis.
    """
    cuts = _matrix_cuts(w, cuts_of(spec, w.ndim, mesh))
    if cuts is None:
        return None
    n = pieces(cuts)[-2]
    if n > 1 and (w.pad or w.scales.shape[-2] % n or w.in_features // n % 32):
        return None
    names = [tuple(name for name, _ in cut) or None for cut in cuts]
    of_matrix = PartitionSpec(*names)
    zeros = None if w.zeros is None else of_matrix
    of_input = None if w.input_scale is None else PartitionSpec(*names[:-1])
    specs: Any = of_matrix
    return replace(w, codes=specs, scales=specs, zeros=zeros, input_scale=of_input)


def _matrix_cuts(w: QuantizedTensor, cuts: Cuts) -> Cuts | None:
    """What cuts each axis of w's matrix (*stack, *lead, i, o)."""
    if w.layout is None:
        return cuts
    layers, rest = _split(w, cuts)
    inside = w.layout.in_matrix(rest, ())
    return None if inside is None else (*layers, *inside)


def _split(w: QuantizedTensor, cuts: Cuts) -> tuple[Cuts, Cuts]:
    """What cuts the axes of layers of w's param, and what its others."""
    assert w.layout is not None
    places = w.layout.places(w.codes.ndim - w.layout.n_lead - 2)
    return tuple(cuts[k] for k in places), tuple(cut for k, cut in enumerate(cuts) if k not in places)


def as_shard(w: QuantizedTensor, cuts: Cuts) -> QuantizedTensor:
    """`w`, of which the leaves are those of one shard, with the layout of one shard."""
    return w if w.layout is None else replace(w, layout=w.layout.cut(pieces(_split(w, cuts)[1])))


def placed_like(w: QuantizedTensor, dense: Any) -> QuantizedTensor:
    """`w` on the devices of the dense param, cut into shards like it; whole on each where it cannot be."""
    sharding = getattr(dense, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return w
    place = lambda spec: NamedSharding(sharding.mesh, spec)
    return jax.device_put(w, jax.tree.map(place, partition_specs(w, sharding.spec, sharding.mesh)))


def partition_specs(qparams: Any, specs: Any, mesh: Any) -> Any:
    """`specs`, PartitionSpecs of the dense params, with those of a QuantizedTensor's leaves where one stands.

    A weight that cannot be cut as its dense param was (see `leaf_specs`) is whole on every device.

    Args:
      qparams: from `quantize`.
      specs: a PartitionSpec for each dense param, in the structure of the dense params.
      mesh: whose axes the specs name.

    Example:
      >>> shardings = jax.tree.map(partial(NamedSharding, mesh), awq.partition_specs(qparams, specs, mesh))
      >>> qparams = jax.device_put(qparams, shardings)
    """

    def one(w: Any, spec: PartitionSpec) -> Any:
        if not is_quantized(w):
            return spec
        found = leaf_specs(w, spec, mesh)
        return jax.tree.map(lambda leaf: PartitionSpec(), w) if found is None else found

    return jax.tree.map(one, qparams, specs, is_leaf=is_quantized)

"""What cuts a param into shards, and how the leaves of the QuantizedTensor in its place are cut alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from awq_jax.kernels import PACKINGS
from awq_jax.kernels.partitioning import names_of
from awq_jax.weights.layout import Cuts, names_in, pieces
from awq_jax.weights.paths import named_leaves
from awq_jax.weights.tensor import QuantizedTensor, is_quantized


def cuts_of(spec: PartitionSpec, ndim: int, mesh: Any) -> Cuts:
    """By axis the mesh axes that cut it, and their sizes."""
    entries = (*spec, *[None] * (ndim - len(spec)))
    return tuple(tuple((name, mesh.shape[name]) for name in names_of(entry)) for entry in entries)


def leaf_specs(w: QuantizedTensor, spec: PartitionSpec, mesh: Any) -> QuantizedTensor | None:
    """The PartitionSpec of every leaf of `w`, where `spec` is the dense param's.

    None where a shard of the param would be no piece of the leaves: it cuts through a group, through the words of 32
    rows (the tiles of 128), or an axis that is not the first of those merged into the input or the output axis.
    """
    cuts = _matrix_cuts(w, cuts_of(spec, w.ndim, mesh))
    if cuts is None:
        return None
    n = pieces(cuts)[-2]
    if n > 1 and (w.pad or w.scales.shape[-2] % n or w.in_features // n % PACKINGS[w.packing].together):
        return None
    names = [names_in((cut,)) or None for cut in cuts]
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
    inside = w.layout.cuts_of(rest)
    return None if inside is None else (*layers, *inside)


def _split(w: QuantizedTensor, cuts: Cuts) -> tuple[Cuts, Cuts]:
    """What cuts the axes of layers of w's param, and what its others."""
    assert w.layout is not None
    places = w.layout.places(w.scales.ndim - w.layout.n_lead - 2)
    return tuple(cuts[k] for k in places), tuple(cut for k, cut in enumerate(cuts) if k not in places)


def as_shard(w: Any, cuts: Cuts) -> Any:
    """`w`, of which the leaves are those of one shard, with the layout of one shard."""
    if not is_quantized(w) or w.layout is None:
        return w
    return replace(w, layout=w.layout.cut(pieces(_split(w, cuts)[1])))


def gathered(
    w: QuantizedTensor, axis: int, cuts: Cuts, gather: Callable[[Array, int], Array]
) -> QuantizedTensor | None:
    """A shard put together along an axis of its param; None where the leaves cannot be.

    Args:
      cuts: what cuts each axis of the param.
      gather: of an array and its axis.
    """
    alone = tuple(cut if k == axis else () for k, cut in enumerate(cuts))
    of_matrix = _matrix_cuts(w, alone)
    if of_matrix is None:
        return None
    (k,) = (k for k, cut in enumerate(of_matrix) if cut)
    is_output = k == len(of_matrix) - 1
    layout = None if w.layout is None else w.layout.whole(pieces(_split(w, alone)[1]))
    return replace(
        w,
        codes=gather(w.codes, k),
        scales=gather(w.scales, k),
        zeros=None if w.zeros is None else gather(w.zeros, k),
        input_scale=w.input_scale if w.input_scale is None or is_output else gather(w.input_scale, k),
        layout=layout,
    )


def placed_like(w: Any, like: Any) -> Any:
    """`w` on the devices of the dense param, cut into shards like it where its groups allow.

    Args:
      w: array or QuantizedTensor.
      like: what has a sharding, or has none; or a QuantizedTensor of those, whose leaves are those of w.
    """
    if is_quantized(like) and jax.tree.structure(w) == jax.tree.structure(like):
        return jax.tree.map(placed_like, w, like)
    sharding = getattr(like, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return w
    place = lambda spec: NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    return jax.device_put(w, jax.tree.map(place, partition_specs(w, sharding.spec, sharding.mesh)))


def partition_specs(qparams: Any, specs: Any, mesh: Any) -> Any:
    """`specs`, PartitionSpecs of the dense params, with those of a QuantizedTensor's leaves where one stands.

    An axis along which the leaves cannot be cut as the dense param is (see `leaf_specs`) is not cut.

    Args:
      qparams: from `quantize`.
      specs: a PartitionSpec for each dense param, in their structure without boxes; `nn.get_partition_spec(variables)`
        say. None is not cut.
      mesh: whose axes the specs name.

    Returns:
      a PartitionSpec for each leaf of `qparams`, in its structure.

    Raises:
      ValueError: a param without a spec, or a spec without a param; names it.

    Example:
      >>> shardings = jax.tree.map(partial(NamedSharding, mesh), awq.partition_specs(qparams, specs, mesh))
      >>> qparams = jax.device_put(qparams, shardings)
    """

    def one(w: Any, spec: PartitionSpec) -> Any:
        if not is_quantized(w):
            return spec
        alone = [PartitionSpec(*[None] * k, entry) for k, entry in enumerate(spec)]
        fitting = [None if leaf_specs(w, one, mesh) is None else one[-1] for one in alone]
        return leaf_specs(w, PartitionSpec(*fitting), mesh)

    leaves = named_leaves(qparams)
    wanted = named_leaves(specs, lambda s: s is None or isinstance(s, PartitionSpec))
    if odd := sorted(leaves.keys() ^ wanted.keys()):
        of, no = ("param", "PartitionSpec") if odd[0] in leaves else ("PartitionSpec", "param")
        raise ValueError(
            f"{odd[0]} is a {of} without a {no}: give one PartitionSpec for each dense param, in its place."
        )
    placed = [one(w, wanted[name] or PartitionSpec()) for name, w in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(qparams, is_leaf=is_quantized), placed)

"""Quantized params of transformers' models and the matrices that files hold of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from awq_jax.errors import InputError
from awq_jax.tracing.view import View
from awq_jax.weights.tensor import QuantizedTensor


def extents(place: Any, shape: Sequence[int]) -> list[int]:
    """How much of each axis of a param a tensor of the file covers."""
    steps = dict(zip(place.strides, place.shape, strict=True))
    return [steps.get(math.prod(shape[k + 1 :]), 1) for k in range(len(shape))]


def matrix(w: QuantizedTensor, place: Any) -> QuantizedTensor:
    """The part of a weight that a tensor of the file is, as a matrix (in, out).

    Raises:
      InputError: the part is no whole matrix, or cuts its inputs.
    """
    shape, layout = w.shape, w.layout
    axes = [[layout.atoms[a][0] for a in axis] for axis in layout.axes] if layout else [[k] for k in range(w.ndim)]
    covered = extents(place, shape)
    *lead, inputs, outputs = axes
    whole = sorted(k for axis in axes for k in axis) == list(range(w.ndim)) and all(len(axis) == 1 for axis in axes)
    if not whole or covered[inputs[0]] != shape[inputs[0]] or any(covered[k] != 1 for (k,) in lead):
        raise InputError(f"{place.name} is no matrix of the weight that was quantized: leave it dense.")
    starts, (o,) = place.starts(shape), outputs
    picked = tuple(starts[k] for (k,) in lead)
    columns = slice(starts[o], starts[o] + covered[o])
    of = lambda leaf: None if leaf is None else leaf[(*picked, slice(None), columns)]
    scale = None if w.input_scale is None else w.input_scale[picked]
    leaves: dict[str, Any] = {"codes": of(w.codes), "scales": of(w.scales), "zeros": of(w.zeros), "input_scale": scale}
    return QuantizedTensor(**leaves, spec=w.spec, dtype=w.dtype, pad=w.pad)


def joined(
    places: Sequence[Any], shape: Sequence[int], read: Callable[[str], Any], *, transposed: bool
) -> QuantizedTensor:
    """A weight of which a file holds matrices (in, out), the inverse of `matrix`.

    Args:
      shape: of the param.
      transposed: the param has (in, out) in the place of torch's usual (out, in).
    """
    parts = [(place, read(place.name)) for place in places]
    _, first = parts[0]
    if any((w.spec, w.pad) != (first.spec, first.pad) for _, w in parts):
        raise InputError(f"{places[0].name} and its like, which are one matmul, are quantized in different ways.")
    covered = extents(places[0], shape)
    outputs, inputs = [k for k, n in enumerate(covered) if n != 1 or len(shape) == 2][-2:][:: -1 if transposed else 1]
    lead = [k for k in range(len(shape)) if k not in (inputs, outputs)]
    layout = View.of(shape).layout(lead, [inputs])

    def whole(name: str) -> np.ndarray | None:
        like = getattr(first, name)
        if like is None:
            return None
        out = np.empty((*(shape[k] for k in lead), like.shape[0], shape[outputs]), like.dtype)
        for place, w in parts:
            starts = place.starts(shape)
            columns = slice(starts[outputs], starts[outputs] + extents(place, shape)[outputs])
            out[(*(starts[k] for k in lead), slice(None), columns)] = getattr(w, name)
        return out

    leaves: dict[str, Any] = {name: whole(name) for name in ("codes", "scales", "zeros")}
    layout = None if layout.is_matrix else layout
    return QuantizedTensor(**leaves, input_scale=None, spec=first.spec, dtype=first.dtype, pad=first.pad, layout=layout)

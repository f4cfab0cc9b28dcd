"""The tensors of a quantized checkpoint by Hugging Face name, whatever its format, a part at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from awq_jax.formats import orbax
from awq_jax.formats.checkpoint import Checkpoint
from awq_jax.formats.stored import StoredTensor
from awq_jax.pipeline.load import architecture
from awq_jax.pipeline.outputs import OURS
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import is_quantized


@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds.

    Args:
      specs: of each quantized weight its shape (*lead, i, o) and how it is stored.
      count: how many parts there are.
      parts: reads them, each a name and its tensors: Codes, QuantizedTensors and arrays.
    """

    specs: Mapping[str, tuple[tuple[int, ...], QuantSpec]]
    count: int
    parts: Callable[[], Iterator[tuple[str, dict[str, Any]]]]


def weights_of(checkpoint: Checkpoint) -> Weights:
    """The weights of a checkpoint in a codec's format, or in ours."""
    return own_weights(checkpoint) if checkpoint.kind == OURS else stored_weights(checkpoint.tensors)


def stored_weights(tensors: Mapping[str, StoredTensor]) -> Weights:
    """Every tensor is a part."""
    coded = {name: tensor for name, tensor in tensors.items() if tensor.codes and not tensor.picked}
    shape_of = lambda t: t.shape if t.quantized else (*t.shape[:-2], t.shape[-1], t.shape[-2])
    specs = {name: (shape_of(tensor), tensor.coded) for name, tensor in coded.items() if tensor.coded}

    def parts() -> Iterator[tuple[str, dict[str, Any]]]:
        for name, tensor in tensors.items():
            yield name, {name: (tensor.codes if name in coded else tensor.read)()}  # pyright: ignore

    return Weights(specs, len(tensors), parts)


def own_weights(checkpoint: Checkpoint) -> Weights:
    """Every part of our format is one, its params under the names of the model's family."""
    family, _ = architecture(checkpoint)
    about = orbax.read_metadata(checkpoint.path)
    shapes = {path: leaf for path, leaf in orbax.shapes(checkpoint.path).items() if is_quantized(leaf)}
    names = {path: next(iter(family.to_names(nested(path, leaf)))) for path, leaf in shapes.items()}
    specs = {names[path]: (leaf.matrix_shape, leaf.spec) for path, leaf in shapes.items()}

    def parts() -> Iterator[tuple[str, dict[str, Any]]]:
        for part in about["parts"]:
            params = orbax.load_part(checkpoint.path, part, about)
            held = params if part == "outer" else {part: params}
            yield part, {name: w if is_quantized(w) else np.asarray(w) for name, w in family.to_names(held).items()}

    return Weights(specs, len(about["parts"]), parts)


def nested(path: str, leaf: Any) -> dict[str, Any]:
    """Params that hold one leaf."""
    first, _, rest = path.partition("/")
    return {first: nested(rest, leaf) if rest else leaf}

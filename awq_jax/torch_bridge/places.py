"""Where the params of transformers' models lie in checkpoints, which name and cut some of them in another way.

transformers can turn a state_dict back into what the file holds. Done with tensors of the meta device, it tells for
each of the file's tensors which part of a param it is: a view has an offset and strides.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from awq_jax.errors import InputError, one_line


@dataclass(frozen=True)
class Place:
    """A tensor of a file as a part of a param.

    Args:
      name: in the file.
      shape: there.
      offset, strides: of its first element, and from one to the next along each axis, in elements of the param.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    def of(self, param: np.ndarray) -> np.ndarray:
        """The part of a param, a view of it; `param` is contiguous."""
        strides = [n * param.itemsize for n in self.strides]
        return np.lib.stride_tricks.as_strided(param.reshape(-1)[self.offset :], self.shape, strides)

    def starts(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Where the part begins, along each axis of a param of that shape."""
        return tuple(int(k) for k in np.unravel_index(self.offset, shape)) if shape else ()


Places = Mapping[str, tuple[Place, ...]]


def places(model: Any, params: Mapping[str, Any], stored: Mapping[str, Sequence[int]]) -> Places:
    """For each param its parts in a checkpoint.

    Args:
      model: of transformers, made from the checkpoint's config.
      params: by name, with shapes.
      stored: the shapes of the checkpoint's tensors.

    Raises:
      InputError: a param that the checkpoint does not have, in these shapes.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = {name: _parts(model, name, w.shape, stored, prefix) for name, w in params.items()}
    for name, parts in found.items():
        for part in parts:
            if tuple(stored.get(part.name, ())) != part.shape:
                there = f"is of shape {tuple(stored[part.name])}" if part.name in stored else "is not there"
                raise InputError(
                    f"{part.name} {there}: transformers' {type(model).__name__} takes {name} from it and expects "
                    f"{part.shape}. Does config.json belong to these weights?"
                )
    return found


def _parts(model: Any, name: str, shape: Sequence[int], stored: Collection[str], prefix: str) -> tuple[Place, ...]:
    from transformers.core_model_loading import revert_weight_conversion

    whole = torch.empty(tuple(shape), device="meta")
    try:
        with Uncopied():
            back = revert_weight_conversion(model, {name: whole})
    except Exception as e:
        raise InputError(f"{name}: transformers does not tell what checkpoints call it ({one_line(e)}).") from e
    if odd := [n for n, part in back.items() if part is not whole and part._base is not whole]:
        raise InputError(f"{name}: checkpoints hold {odd[0]} in its place, which is no part of it: not known here.")
    named = lambda n: next((m for m in (n, n.removeprefix(prefix), prefix + n) if m in stored), n)
    return tuple(
        Place(named(n), tuple(part.shape), int(part.storage_offset()), tuple(part.stride())) for n, part in back.items()
    )


class Uncopied(TorchFunctionMode):
    """Inside, views stay views, though their elements do not lie one after the other."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))


def assembled(places: Sequence[Place], shape: Sequence[int], read: Callable[[str], Any]) -> np.ndarray:
    """A param, from its parts in the file."""
    first = places[0]
    if len(places) == 1 and (first.shape, first.strides) == (tuple(shape), np.empty(shape, np.int8).strides):
        return read(first.name)
    parts = ((place, np.asarray(read(place.name))) for place in places)
    whole: np.ndarray | None = None
    for place, part in parts:
        whole = np.empty(tuple(shape), part.dtype) if whole is None else whole
        place.of(whole)[...] = part
    assert whole is not None
    return whole

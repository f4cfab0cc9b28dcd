"""What torch.export makes of a module: a functional graph of its operations, for inputs of certain shapes.

No weight is in memory while it is traced: params are fake tensors. Buffers are as they are.
"""

from __future__ import annotations

import copy
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from awq_jax.errors import InputError, one_line
from awq_jax.text import unprinted
from awq_jax.torch_bridge.operations.table import find

Call = Callable[[torch.nn.Module, Sequence[torch.Tensor]], list[Any]]
"""Calls a module with the tensors among its arguments; gives its outputs as a list."""
INSIDE = "model"
"""What the module is called in the graph."""


def skeleton(model: torch.nn.Module) -> tuple[torch.nn.Module, FakeTensorMode]:
    """A copy of a module for inference without its weights, and the mode that its params were made in."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake: dict[int, Any] = {}
    with mode:
        for p in model.parameters():
            fake[id(p)] = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=False)
    bare = copy.deepcopy(model, fake).eval()
    # transformers' plain loop over experts asks for values; torch's one matmul for all of them does not.
    for module in bare.modules():
        if callable(choose := getattr(module, "set_experts_implementation", None)):
            with suppress(ValueError):  # it has no experts
                choose("grouped_mm")
    return bare, mode


def exported(model: torch.nn.Module, mode: FakeTensorMode, call: Call, example: Sequence[torch.Tensor]) -> Any:
    """The ExportedProgram of a skeleton, of operations for which the table has functions as far as possible.

    Args:
      example: tensors on the meta device.

    Raises:
      InputError: the module cannot be traced; says where.
    """
    with mode:
        fake = tuple(torch.empty(x.shape, dtype=x.dtype) for x in example)
    try:
        with torch.no_grad(), unlogged(), unprinted():
            found = torch.export.export(Called(model, call), fake, strict=False)
            return found.run_decompositions(decompositions())
    except Exception as e:
        raise InputError(
            f"{_place(model, e)}: torch.export cannot trace this ({type(e).__name__}: {one_line(e)}): a branch or a "
            "shape must not depend on values; choose another implementation of attention or experts "
            "(model.set_attn_implementation('eager')), or other arguments."
        ) from e


def decompositions() -> Any:
    """torch's decompositions, without those of operations that the table has."""
    found = torch.export.default_decompositions()
    for op in list(found):
        if find(key(op)) is not None:
            found.pop(op)
    return found


def key(op: Any) -> str:
    """The name of one of torch's operations in the table, with its overload."""
    namespace, name = op._schema.name.split("::")
    return ("" if namespace == "aten" else f"{namespace}::") + f"{name}.{op._schema.overload_name or 'default'}"


@contextmanager
def unlogged() -> Iterator[None]:
    """Without what torch logs of an error that it also raises, thousands of lines, and without its warnings of what its
    own code is to change."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.disable(before)


class Called(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, call: Call) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *tensors: torch.Tensor) -> list[Any]:
        return self.call(self.model, tensors)


def _place(model: torch.nn.Module, error: BaseException) -> str:
    """The innermost module that was running when an error was raised, and the line."""
    names = {id(module): name for name, module in model.named_modules()}
    found = type(model).__name__
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = names.get(id(frame.f_locals.get("self")))
        if name is not None:
            file = frame.f_code.co_filename.rsplit("/", 1)[-1]
            found = f"{name or type(model).__name__} ({file}:{line})"
    return found

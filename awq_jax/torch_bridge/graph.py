"""torch's graph as a Program."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils._pytree import tree_leaves

from awq_jax.errors import InputError
from awq_jax.torch_bridge.operations.table import Operation, find
from awq_jax.torch_bridge.program import Program, Ref, Step
from awq_jax.torch_bridge.trace import INSIDE, key
from awq_jax.torch_bridge.values import array, dtype_of, shape_of

HALVES = (torch.float16, torch.bfloat16)

NOWHERE = {"device", "layout", "pin_memory", "memory_format", "non_blocking"}
"""Arguments about where and how tensors lie in memory."""


def program(exported: Any, names: Mapping[str, str]) -> Program:
    """The Program of an ExportedProgram.

    Args:
      names: by the name of a parameter or buffer in the module that of the param; buffers that have none are constants.

    Raises:
      InputError: an operation is not in the table; names it, and the module that calls it.
    """
    signature = exported.graph_signature
    nodes = list(exported.graph_module.graph.nodes)
    kept = needed(nodes, signature)
    kinds = {spec.arg.name: spec for spec in signature.input_specs}
    params: dict[str, str] = {}
    constants: dict[str, Any] = {}
    inputs: list[str] = []
    for node in nodes:
        if node.op == "get_attr" and node in kept:
            constants[node.name] = array(node.target, getattr(exported.graph_module, node.target))
        if node.op != "placeholder":
            continue
        spec = kinds[node.name]
        inside = (spec.target or "").removeprefix(f"{INSIDE}.")
        if spec.kind == InputKind.USER_INPUT:
            inputs.append(node.name)
        elif inside in names and spec.kind != InputKind.CONSTANT_TENSOR:
            params[node.name] = names[inside]
        elif node in kept:
            stored = exported.state_dict if spec.target in exported.state_dict else exported.constants
            constants[node.name] = array(inside, stored[spec.target])
    calls = [node for node in nodes if node.op == "call_function" and node in kept]
    refuse_unknown(calls)
    last = last_reads(calls, {spec.arg.name for spec in signature.output_specs})
    steps = tuple(step(node, last.get(node.name, ())) for node in calls)
    outputs = [spec.arg for spec in signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    given = tuple(arg.value if isinstance(arg, ConstantArgument) else Ref(arg.name) for arg in outputs)
    return Program(params, constants, tuple(inputs), steps, given)


def needed(nodes: Sequence[Any], signature: Any) -> set[Any]:
    """The nodes that outputs are made of: no assertions, nothing that a cache would have kept."""
    wanted = {spec.arg.name for spec in signature.output_specs if spec.kind == OutputKind.USER_OUTPUT}
    found: set[Any] = set()
    for node in reversed(nodes):
        if node.name in wanted:
            found.add(node)
            wanted |= {other.name for other in node.all_input_nodes}
    return found


def last_reads(calls: Sequence[Any], outputs: set[str]) -> dict[str, tuple[str, ...]]:
    """By the name of a call the values that no later one reads."""
    seen = set(outputs)
    found = {}
    for node in reversed(calls):
        names = {other.name for other in node.all_input_nodes} | {node.name}
        found[node.name] = tuple(sorted(names - seen))
        seen |= names
    return found


def step(node: Any, last: tuple[str, ...]) -> Step:
    args, kwargs = plain(node.args), {name: plain(arg) for name, arg in node.kwargs.items() if name not in NOWHERE}
    value = node.meta.get("val")
    called = "getitem" if node.target is operator.getitem else key(node.target).removesuffix(".default")
    if any(not isinstance(n, int) for x in tree_leaves(value) for n in getattr(x, "shape", ())):
        raise InputError(
            f"{where(node)}: torch's {called} gives as many elements as values say: no shape in JAX depends on values."
        )
    gives = shape_of(value) if isinstance(value, torch.Tensor) else None
    operation = entry(node)
    common = dtype_of(common_dtype(node)) if operation is not None and operation.promotes else None
    return Step(node.name, called, operation, args, kwargs, common, gives, where(node), last)


def entry(node: Any) -> Operation | None:
    """The table's entry, None for the item of a list."""
    if node.target is operator.getitem:
        return None
    return find(key(node.target))


def refuse_unknown(calls: Sequence[Any]) -> None:
    unknown: dict[str, str] = {}
    for node in calls:
        if not hasattr(node.target, "_schema"):
            if node.target is not operator.getitem:
                unknown.setdefault(str(node.target), where(node))
        elif entry(node) is None:
            unknown.setdefault(key(node.target).removesuffix(".default"), where(node))
    if unknown:
        told = "; ".join(f"{name} (in {place})" for name, place in list(unknown.items())[:4])
        raise InputError(
            f"torch's {told}: no JAX function for {'it' if len(unknown) == 1 else 'them'} is known here. Put one into "
            "the table: @awq_jax.torch_bridge.operations.table.operation('NAME')."
        )


def common_dtype(node: Any) -> torch.dtype:
    """The dtype in which an elementwise operation computes: that of what it gives, or of what a comparison compares."""
    given = node.meta["val"].dtype
    values = [arg.meta["val"] if isinstance(arg, torch.fx.Node) else arg for arg in node.args[:2]]
    if given in HALVES and key(node.target).startswith(("mul.", "div.")) and any(map(is_number, values)):
        return torch.float32  # as torch: a number that halves do not have is not infinite, times zero it is zero
    if not given.is_complex and isinstance(values[0], torch.Tensor) and values[0].is_complex():
        return values[0].dtype  # its size
    if given != torch.bool:
        return given
    # A dimension or none matters, not its size.
    stand_in = lambda x: torch.empty([1] * min(x.ndim, 1), dtype=x.dtype) if isinstance(x, torch.Tensor) else x
    return torch.result_type(*(stand_in(x) for x in values)) if len(values) > 1 else values[0].dtype


def is_number(value: Any) -> bool:
    """Whether this is a number, or a tensor that stands for one, of more digits than halves have."""
    if isinstance(value, torch.Tensor):
        return value.ndim == 0 and value.is_floating_point() and value.dtype not in HALVES
    return isinstance(value, int | float)


def plain(arg: Any) -> Any:
    """An argument without torch: Refs, jax dtypes, lists, numbers."""
    if isinstance(arg, torch.fx.Node):
        return Ref(arg.name)
    if isinstance(arg, list | tuple):
        return tuple(plain(part) for part in arg)
    if isinstance(arg, torch.dtype):
        return dtype_of(arg)
    if arg is None or isinstance(arg, bool | int | float | complex | str):
        return arg
    if isinstance(arg, torch.layout | torch.device | torch.memory_format):
        return None
    raise InputError(f"torch's graph holds {arg!r}, a {type(arg).__name__}: nothing here is one.")


def where(node: Any) -> str:
    """The path of the module that calls an operation."""
    stack = node.meta.get("nn_module_stack") or {}
    path = [name for name, _ in stack.values()]
    return path[-1].removeprefix(INSIDE).removeprefix(".") or "the model" if path else "the model"

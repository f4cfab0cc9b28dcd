"""`from_torch`: a PyTorch module as a JAX function and its params."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

import awq_jax.torch_bridge.operations as operations
from awq_jax.errors import InputError
from awq_jax.torch_bridge.arguments import Around, arrays_only, as_traced, split
from awq_jax.torch_bridge.program import Program

if TYPE_CHECKING:
    import torch

Shapes = tuple[tuple[int, ...], ...]
del operations  # imported for what it puts into the table


def from_torch(model: torch.nn.Module, *example: Any, **kwargs: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """`(fn, params)`: what `model(*example, **kwargs)` computes as a pure function `fn(params, *inputs, **kwargs)`.

    The module is traced as for inference (`model.eval()`) by torch.export, without its weights. It is not changed, and
    `fn` does not hold on to it. Inputs of other shapes than the example's are traced when they come, once for each.

    torch's integers of 64 bits, in which it also sums narrower ones, have 32 here unless jax_enable_x64 is set:
    constants beyond them are refused, what is computed beyond them wraps around.

    Args:
      model: any module that torch.export can trace, such as those of transformers, with params in memory or on the meta
        device. Buffers that are not in its state_dict must be in memory.
      example: positional arguments, torch's tensors, arrays or jax.ShapeDtypeStructs, in dicts and lists too. Of these
        only shape and dtype matter; all else (numbers, True, None) is fixed as it is.
      kwargs: further arguments of the same kinds.

    Returns:
      fn: gives what the module gives with arrays in place of tensors, and a dict in place of a ModelOutput; what is
        neither a tensor nor made of them (a cache of keys and values) is left out.
      params: a flat dict with the names of torch's state_dict; where two of them are one tensor, the first. Weights of
        linears stay (out, in). ShapeDtypeStructs where the module is on the meta device.

    Raises:
      InputError: torch is missing; the module cannot be traced, or has an operation that is unknown here (says which
        and where); a dtype that JAX does not have. And from `fn`: other arguments than those traced.

    Example:
      >>> model = transformers.AutoModelForCausalLM.from_pretrained(folder)
      >>> fn, params = awq.from_torch(model, tokens)
      >>> qparams, report = awq.quantize(params, awq.calibrate(fn, params, batches))
      >>> logits = jax.jit(awq.quantized(fn))(qparams, tokens)["logits"]
    """
    fn, params, trace = untraced(model, *example, **kwargs)
    trace()
    return fn, params


def untraced(
    model: torch.nn.Module, *example: Any, **kwargs: Any
) -> tuple[Callable[..., Any], dict[str, Any], Callable[[], Any]]:
    """`from_torch` without any tracing yet: `fn`, params, and what traces for the example."""
    torch = required()
    from awq_jax.torch_bridge import trace, values

    if not isinstance(model, torch.nn.Module):
        raise InputError(f"from_torch was given a {type(model).__name__}: give a torch.nn.Module.")
    tensors, around = split(example, kwargs)
    like = [values.likeness(x) for x in tensors]
    names, params = stored(model)
    bare, mode = trace.skeleton(model)
    programs: dict[Shapes, tuple[Program, Any]] = {}

    def traced(shapes: Shapes) -> tuple[Program, Any]:
        if shapes not in programs:
            given = [torch.empty(s, dtype=x.dtype, device="meta") for s, x in zip(shapes, like, strict=True)]
            programs[shapes] = _program(bare, mode, names, around, given)
        return programs[shapes]

    def fn(params: Mapping[str, Any], *inputs: Any, **kwargs: Any) -> Any:
        arrays, called = split(inputs, around.plain | kwargs)
        if called != around:
            raise InputError(
                f"The module was traced for {around} and is called with {called}: call from_torch for those arguments."
            )
        arrays = [
            as_traced(k, x, values.dtype_of(of.dtype)) for k, (x, of) in enumerate(zip(arrays, like, strict=True))
        ]
        program, tree = traced(tuple(x.shape for x in arrays))
        return jax.tree.unflatten(tree, program.run(params, arrays))

    return fn, params, lambda: traced(tuple(tuple(x.shape) for x in like))


def required() -> Any:
    """torch.

    Raises:
      InputError: it is not installed.
    """
    try:
        import torch
    except ImportError as e:
        raise InputError("Modules of PyTorch need torch, which is not here: pip install 'awq-jax[torch]'.") from e
    return torch


def _program(bare: Any, mode: Any, names: Mapping[str, str], around: Around, like: list[Any]) -> tuple[Program, Any]:
    """The Program of a skeleton for inputs like these, and the tree of its outputs."""
    import torch

    from awq_jax.torch_bridge import graph, trace

    trees = []

    def call(module: torch.nn.Module, tensors: Any) -> list[Any]:
        args, named = around.filled(tensors)
        out = arrays_only(module(*args, **named), lambda x: isinstance(x, torch.Tensor))
        leaves, tree = jax.tree.flatten(out)
        trees.append(tree)
        return leaves

    exported = trace.exported(bare, mode, call, like)
    return graph.program(exported, names), trees[-1]


def stored(model: torch.nn.Module) -> tuple[dict[str, str], dict[str, Any]]:
    """By the name of each parameter and buffer in the state_dict that of its param, and the params.

    Raises:
      InputError: a buffer that is not in the state_dict has no values; a dtype that JAX does not have.
    """
    from awq_jax.torch_bridge import values

    tensors = {k: t for k, t in model.state_dict(keep_vars=True).items() if hasattr(t, "shape")}
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in tensors]
    if lost:
        raise InputError(
            f"{lost[0]} is a buffer on the meta device, whose values no checkpoint holds: make the module within "
            "awq_jax.torch_bridge.meta.without_weights()."
        )
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    return names, {name: values.param(name, tensors[name]) for name in dict.fromkeys(names.values())}

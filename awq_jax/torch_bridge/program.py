"""A traced module as plain data, and how it is run: one step after the other, on arrays of JAX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from awq_jax.errors import InputError, one_line
from awq_jax.torch_bridge.operations.table import Operation


@dataclass(frozen=True)
class Ref:
    """Stands in a step's arguments for the value of that name."""

    name: str


@dataclass(frozen=True)
class Step:
    """One operation.

    Args:
      name: of what it gives.
      called: the operation's name, for errors.
      operation: what runs it; None takes the item `args[1]` of what `args[0]` is.
      args, kwargs: with Refs in place of arrays.
      common: the dtype to which all arrays among `args` are brought first; None for none.
      gives: shape and dtype of what it gives; None where that is several arrays.
      where: the module that calls it, "model.layers.0.mlp".
      last: the values that no later step reads.
    """

    name: str
    called: str
    operation: Operation | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    common: Any
    gives: jax.ShapeDtypeStruct | None
    where: str
    last: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """A module for inputs of certain shapes.

    Args:
      params: by the name of a value the param that it is.
      constants: by the name of a value what it is.
      inputs: the names of the values that the inputs are.
      steps: in their order.
      outputs: the names of the outputs' values, or what they are without any computation.
    """

    params: Mapping[str, str]
    constants: Mapping[str, Array]
    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Any, ...]

    def run(self, params: Mapping[str, Array], inputs: Sequence[Array]) -> list[Any]:
        """The outputs, in their order."""
        values: dict[str, Any] = dict(self.constants)
        values |= {name: params[param] for name, param in self.params.items()}
        values |= zip(self.inputs, inputs, strict=True)
        # Steps promote what torch promotes; Python numbers and ranks go JAX's way, which is torch's too.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            for step in self.steps:
                values[step.name] = ran(step, values)
                for name in step.last:
                    del values[name]
        return [values[out.name] if isinstance(out, Ref) else out for out in self.outputs]


def ran(step: Step, values: Mapping[str, Any]) -> Any:
    """What a step gives, in torch's shape and dtype."""
    args, kwargs = filled(step.args, values), filled(step.kwargs, values)
    if step.operation is None:
        return args[0][args[1]]
    if step.common is not None:
        args = [x.astype(step.common) if isinstance(x, jax.Array) else x for x in args]
    try:
        y = step.operation.run(*args, **kwargs)
    except (NotImplementedError, OverflowError, TypeError, ValueError) as e:
        raise InputError(
            f"{step.where}: torch's {step.called} cannot be done in JAX as it is called here ({one_line(e)}): "
            "put a function that can into the table, awq_jax.torch_bridge.operations.table.operation."
        ) from e
    if step.gives is None:
        return y
    if jnp.shape(y) != step.gives.shape:
        raise RuntimeError(
            f"{step.where}: {step.called} gives {jnp.shape(y)} in JAX and {step.gives.shape} in torch: its entry in "
            "awq_jax.torch_bridge.operations is wrong."
        )
    return jnp.asarray(y, step.gives.dtype)


def filled(template: Any, values: Mapping[str, Any]) -> Any:
    """Arguments with values in place of Refs."""
    if isinstance(template, Ref):
        return values[template.name]
    if isinstance(template, list | tuple):
        return [filled(part, values) for part in template]
    if isinstance(template, Mapping):
        return {key: filled(part, values) for key, part in template.items()}
    return template

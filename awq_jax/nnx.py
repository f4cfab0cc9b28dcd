"""flax.nnx modules: `quantize_module` takes one and returns one; `QuantizedLinear` starts quantized."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from awq_jax.quantize import SiteReport, quantize
from awq_jax.recipe import Recipe
from awq_jax.spec import QuantSpec
from awq_jax.tensor import dot
from awq_jax.tensor import quantize as to_nearest
from awq_jax.transform import calibrate, quantized


class QuantizedModule(nnx.Module):
    """Calls a module with QuantizedTensors for params; what else it keeps (caches, random streams) it keeps on.

    Whether it trains or evaluates is part of its structure: `eval()` and `train()` change it before, not after.

    Args:
      graphdef: the module's structure, from `nnx.split`.
      params: its nnx.Param state, some of it QuantizedTensors.
      rest: the rest of its state.
    """

    def __init__(self, graphdef: Any, params: nnx.State, rest: nnx.State):
        self.graphdef, self.params, self.rest = graphdef, nnx.data(params), nnx.data(rest)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        run = quantized(lambda params, rest, *inputs: _called(self.graphdef, params, rest, *inputs, **options))
        y, rest = run(self.params, self.rest, *inputs)
        nnx.update(self.rest, rest)
        return y


def _called(graphdef: Any, params: nnx.State, rest: nnx.State, *inputs: Any, **options: Any) -> tuple[Any, Any]:
    module = nnx.merge(graphdef, params, rest)
    y = module(*inputs, **options)
    return y, nnx.split(module, nnx.Param, ...)[2]


def quantize_module(
    module: nnx.Module, batches: Iterable[tuple[Any, ...]], recipe: Recipe | None = None
) -> tuple[QuantizedModule, tuple[SiteReport, ...]]:
    """A module that computes what `module` does, with its matrices quantized, and a report of each site's error.

    Args:
      module: any nnx.Module; put it into evaluation mode first. It stays as it is.
      batches: tuples of what the module is called with.
      recipe: None for 4 bits in groups of 128.

    Raises:
      ValueError: as `calibrate` and `quantize`.

    Example:
      >>> small, report = awq.quantize_module(model, [(tokens,)])
      >>> logits = nnx.jit(lambda m, x: m(x))(small, tokens)
    """
    graphdef, params, rest = nnx.split(nnx.clone(module), nnx.Param, ...)
    fn = lambda params, *inputs: nnx.merge(graphdef, params, rest, copy=True)(*inputs)
    found, report = quantize(params, calibrate(fn, params, batches), recipe)
    return QuantizedModule(graphdef, found, rest), report


class QuantizedLinear(nnx.Module):
    """`x @ kernel (+ bias)` in x's dtype, the kernel a QuantizedTensor.

    Args:
      spec: how the new kernel is rounded.
      rngs: of the new kernel, stream "params".

    Example:
      >>> layer = QuantizedLinear(512, 512, awq.QuantSpec(4, 64), rngs=nnx.Rngs(0))
    """

    def __init__(self, in_features: int, out_features: int, spec: QuantSpec, *, use_bias: bool = True, rngs: nnx.Rngs):
        dense = nnx.initializers.lecun_normal()(rngs.params(), (in_features, out_features))
        self.kernel = nnx.Param(to_nearest(dense, spec))
        self.bias = nnx.Param(jnp.zeros(out_features)) if use_bias else None

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        y = dot(x, self.kernel.get_value())
        return y if self.bias is None else y + self.bias.get_value().astype(x.dtype)

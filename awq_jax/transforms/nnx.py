"""flax.nnx modules: `quantize_module` takes one and returns one; `QuantizedLinear` starts quantized."""

from __future__ import annotations

import functools as ft
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from awq_jax.transforms.calibrate import calibrate, quantized
from awq_jax.transforms.quantize import SiteReport, quantize
from awq_jax.transforms.recipe import Recipe
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import SCALE_DTYPE, dot, plus, round_to_nearest


class QuantizedModule(nnx.Module):
    """Runs a module of which some params are QuantizedTensors, with low-bit matmuls.

    What `module` has it has too: attributes, submodules and methods, which run with low-bit matmuls as the call itself
    does, `train()` and `eval()`. What the module changes while it runs (caches, counters, random streams) stays so.

    Args:
      module: of the type and structure it had when it was dense; from `quantize_module`, or put together by `nnx.merge`
        of what `load_params` gives. Attributes are set on it, `small.module.rate = 0.1`.

    Example:
      >>> graphdef, like = nnx.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))
      >>> small = awq.QuantizedModule(nnx.merge(graphdef, awq.load_params("folder", like=like)))
    """

    def __init__(self, module: nnx.Module):
        self.module = module

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return _run(self.module, type(self.module).__call__, *inputs, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "module" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        found = getattr(self.module, name)
        is_method = inspect.ismethod(found) and found.__self__ is self.module
        return ft.partial(_run, self.module, found.__func__) if is_method else found


def _run(module: Any, method: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """What `method` of the module gives; the module keeps what it changed but its params."""
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def fn(params: Any, rest: Any, *inputs: Any) -> tuple[Any, Any]:
        copy = nnx.merge(graphdef, params, rest)
        y = method(copy, *inputs, **options)
        return y, nnx.state(copy, nnx.Not(nnx.Param))

    y, rest = quantized(fn)(params, rest, *inputs)
    nnx.update(module, rest)
    return y


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
    return QuantizedModule(nnx.merge(graphdef, found, rest)), report


class QuantizedLinear(nnx.Module):
    """`x @ kernel (+ bias)` in x's dtype, the kernel a QuantizedTensor.

    Args:
      spec: how the new kernel is rounded; its steps are float16, which holds those of all initial weights.
      rngs: of the new kernel, stream "params".

    Example:
      >>> layer = QuantizedLinear(512, 512, awq.QuantSpec(4, 64), rngs=nnx.Rngs(0))
    """

    def __init__(self, in_features: int, out_features: int, spec: QuantSpec, *, use_bias: bool = True, rngs: nnx.Rngs):
        dense = nnx.initializers.lecun_normal()(rngs.params(), (in_features, out_features))
        self.kernel = nnx.Param(round_to_nearest(dense, spec, steps=SCALE_DTYPE))
        self.bias = nnx.Param(jnp.zeros(out_features)) if use_bias else None

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        y = dot(x, self.kernel.get_value())
        return plus(y, None if self.bias is None else self.bias.get_value().astype(x.dtype))

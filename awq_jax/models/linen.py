"""flax.linen layers whose kernels may be quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import SCALE_DTYPE, QuantizedTensor, dot, dots, is_quantized, plus, round_to_nearest


class QuantizedDense(nn.Module):
    """`x @ kernel (+ bias)` in x's dtype; the kernel (i, o) may be an array or a QuantizedTensor.

    Args:
      features: o.
      use_bias: add a bias.
      spec: how a new kernel is rounded, with float16 steps, which hold those of all initial weights; None starts with
        a dense one. Params that hold either are taken as they are, their steps in any dtype.

    Example:
      >>> layer = QuantizedDense(512, spec=awq.QuantSpec(4, 64))
      >>> params = layer.init(jax.random.key(0), x)["params"]  # {"kernel": QuantizedTensor}
    """

    features: int
    use_bias: bool = False
    spec: QuantSpec | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        kernel, bias = self._params(x)
        return plus(dot(x, kernel), bias)

    @property
    def lead(self) -> tuple[int, ...]:
        """Axes of the kernel before those of the matrix."""
        return ()

    def _params(self, x: Float[Array, "*b i"]) -> tuple[Array | QuantizedTensor, Array | None]:
        """The kernel and the bias, dense ones in x's dtype."""
        kernel: Any
        # self.param would hold the leaves of a QuantizedTensor against the initializer's shape.
        if self.has_variable("params", "kernel"):
            kernel = self.get_variable("params", "kernel")
        else:
            kernel = self.param("kernel", self._new_kernel, x.shape[-1])
        if kernel.shape != (shape := (*self.lead, x.shape[-1], self.features)):
            name = "/".join((*self.path, "kernel"))
            raise ValueError(f"{name} has shape {kernel.shape}, the layer asks for {shape}.")
        kernel = kernel if is_quantized(kernel) else kernel.astype(x.dtype)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", nn.initializers.zeros, (*self.lead, self.features)).astype(x.dtype)

    def _new_kernel(self, key: jax.Array, in_features: int) -> Array | QuantizedTensor:
        start = nn.initializers.lecun_normal(batch_axis=range(len(self.lead)))
        dense = start(key, (*self.lead, in_features, self.features))
        return dense if self.spec is None else round_to_nearest(dense, self.spec, steps=SCALE_DTYPE)


class ExpertsDense(QuantizedDense):
    """Rows, sorted by expert, each with the matrix of its own: the kernel is (e, i, o), the bias (e, o)."""

    experts: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "rows i"], sizes: Int[Array, " e"]) -> Float[Array, "rows o"]:
        kernel, bias = self._params(x)
        y = dot(x, kernel, sizes)
        return y if bias is None else y + jnp.repeat(bias, sizes, axis=0, total_repeat_length=len(x))

    @property
    def lead(self) -> tuple[int, ...]:
        return (self.experts,)


class _Params(QuantizedDense):
    """What a QuantizedDense multiplies x with and adds."""

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> tuple[Array | QuantizedTensor, Array | None]:
        return self._params(x)


def projections(x: Float[Array, "*b i"], features: Mapping[str, int], use_bias: bool = False) -> list[Array]:
    """What the QuantizedDense layers of these names and features make of the same x, in a compact method.

    Quantized kernels are multiplied in one launch where that can be.
    """
    kernels, biases = zip(*(_Params(o, use_bias, name=name)(x) for name, o in features.items()), strict=True)
    return [plus(y, bias) for y, bias in zip(dots(x, *kernels), biases, strict=True)]

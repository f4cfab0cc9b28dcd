"""A flax.linen layer whose kernel may be quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

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
        y = dot(x, kernel)
        return plus(y, bias)

    def _params(self, x: Float[Array, "*b i"]) -> tuple[Array | QuantizedTensor, Array | None]:
        """The kernel and the bias, dense ones in x's dtype."""
        kernel: Any
        # self.param would hold the leaves of a QuantizedTensor against the initializer's shape.
        if self.has_variable("params", "kernel"):
            kernel = self.get_variable("params", "kernel")
        else:
            kernel = self.param("kernel", self._new_kernel, x.shape[-1])
        if kernel.shape != (x.shape[-1], self.features):
            name = "/".join((*self.path, "kernel"))
            raise ValueError(f"{name} has shape {kernel.shape}, the layer asks for {(x.shape[-1], self.features)}.")
        kernel = kernel if is_quantized(kernel) else kernel.astype(x.dtype)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)

    def _new_kernel(self, key: jax.Array, in_features: int) -> Array | QuantizedTensor:
        dense = nn.initializers.lecun_normal()(key, (in_features, self.features))
        return dense if self.spec is None else round_to_nearest(dense, self.spec, steps=SCALE_DTYPE)


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

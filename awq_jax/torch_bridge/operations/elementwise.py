"""Elementwise operations. torch brings all tensors to one dtype first, which is done before these are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from awq_jax.torch_bridge.operations.reductions import wide
from awq_jax.torch_bridge.operations.table import operation

UNARY: dict[str, Callable[..., Any]] = {
    "abs": jnp.abs,
    "acos": jnp.arccos,
    "acosh": jnp.arccosh,
    "asin": jnp.arcsin,
    "asinh": jnp.arcsinh,
    "atan": jnp.arctan,
    "atanh": jnp.arctanh,
    "bitwise_not": jnp.bitwise_not,
    "ceil": jnp.ceil,
    "cos": jnp.cos,
    "cosh": jnp.cosh,
    "erf": lax.erf,
    "erfc": lax.erfc,
    "exp": jnp.exp,
    "exp2": lambda x: jnp.exp2(wide(x)),
    "expm1": jnp.expm1,
    "floor": jnp.floor,
    "isfinite": jnp.isfinite,
    "isinf": jnp.isinf,
    "isnan": jnp.isnan,
    "log": jnp.log,
    "log10": jnp.log10,
    "log1p": jnp.log1p,
    "log2": jnp.log2,
    "logical_not": jnp.logical_not,
    "neg": jnp.negative,
    "reciprocal": lambda x: 1 / x,
    "relu": lambda x: jnp.maximum(x, 0),
    "rsqrt": lax.rsqrt,
    "sigmoid": jax.nn.sigmoid,
    "sign": lambda x: x if x.dtype == jnp.bool_ else jnp.where(jnp.isnan(x), 0, jnp.sign(x)),
    "silu": jax.nn.silu,
    "sin": jnp.sin,
    "sinh": jnp.sinh,
    "sqrt": jnp.sqrt,
    "square": jnp.square,
    "tan": jnp.tan,
    "tanh": jnp.tanh,
    "trunc": jnp.trunc,
}
BINARY: dict[str, Callable[..., Any]] = {
    "__lshift__": jnp.left_shift,
    "__rshift__": jnp.right_shift,
    "atan2": jnp.arctan2,
    "bitwise_and": jnp.bitwise_and,
    "bitwise_left_shift": jnp.left_shift,
    "bitwise_or": jnp.bitwise_or,
    "bitwise_right_shift": jnp.right_shift,
    "bitwise_xor": jnp.bitwise_xor,
    "clamp_max": jnp.minimum,
    "clamp_min": jnp.maximum,
    "copysign": jnp.copysign,
    "eq": jnp.equal,
    "floor_divide": jnp.floor_divide,
    "fmod": jnp.fmod,
    "ge": jnp.greater_equal,
    "gt": jnp.greater,
    "hypot": jnp.hypot,
    "le": jnp.less_equal,
    "logical_and": jnp.logical_and,
    "logical_or": jnp.logical_or,
    "logical_xor": jnp.logical_xor,
    "lt": jnp.less,
    "max.other": jnp.maximum,
    "maximum": jnp.maximum,
    "min.other": jnp.minimum,
    "minimum": jnp.minimum,
    "mul": jnp.multiply,
    "ne": jnp.not_equal,
    "remainder": jnp.remainder,
}
for name, function in (UNARY | BINARY).items():
    operation(name, promotes=True)(function)


@operation("add", promotes=True)
def add(a: Any, b: Any, /, alpha: float = 1) -> Array:
    return a + (b if alpha == 1 else alpha * b)


@operation("sub", promotes=True)
def sub(a: Any, b: Any, /, alpha: float = 1) -> Array:
    return a - (b if alpha == 1 else alpha * b)


@operation("rsub", promotes=True)
def rsub(a: Any, b: Any, /, alpha: float = 1) -> Array:
    return sub(b, a, alpha)


@operation("div", promotes=True)
def div(a: Any, b: Any, /, rounding_mode: str | None = None) -> Array:
    if rounding_mode == "floor":
        return jnp.floor_divide(a, b)
    if rounding_mode is None:
        return a / b
    if rounding_mode != "trunc":
        raise NotImplementedError(f"rounding_mode={rounding_mode!r}")
    if jnp.issubdtype(jnp.result_type(a, b), jnp.integer):
        return lax.div(*jnp.broadcast_arrays(*(jnp.asarray(x, jnp.result_type(a, b)) for x in (a, b))))
    return jnp.trunc(a / b)


@operation("pow", promotes=True)
def power(a: Any, b: Any, /) -> Array:
    # x ** 2 is no logarithm and no exponential; and folds see how it scales.
    whole = isinstance(b, int | float) and float(b).is_integer() and abs(b) < 8
    if whole:
        return lax.integer_pow(a, int(b))
    if jnp.issubdtype(jnp.result_type(a, b), jnp.inexact):
        return jnp.power(a, b)
    # As torch: negative powers of integers are cut, to zero but for 1 and -1.
    cut = jnp.where(jnp.abs(a) == 1, jnp.power(a, jnp.bitwise_and(b, 1)), 0)
    return jnp.where(jnp.less(b, 0), cut, jnp.power(a, jnp.maximum(b, 0)))


@operation("addcmul", promotes=True)
def addcmul(x: Array, a: Array, b: Array, value: float = 1) -> Array:
    return wide(x) + value * wide(a) * wide(b)


@operation("addcdiv", promotes=True)
def addcdiv(x: Array, a: Array, b: Array, value: float = 1) -> Array:
    return wide(x) + value * wide(a) / wide(b)


@operation("lerp", promotes=True)
def lerp(a: Array, b: Array, weight: Any) -> Array:
    a, b, weight = wide(a), wide(b), wide(weight) if isinstance(weight, jax.Array) else weight
    # From the nearer end, as torch.
    return jnp.where(abs(weight) < 0.5, a + weight * (b - a), b - (b - a) * (1 - weight))


@operation("round", promotes=True)
def round_half_even(x: Array, decimals: int = 0) -> Array:
    return jnp.round(x, decimals)


@operation("clamp", promotes=True)
def clamp(x: Array, min: Any = None, max: Any = None) -> Array:
    x = x if min is None else jnp.maximum(x, min)
    return x if max is None else jnp.minimum(x, max)


@operation("gelu", promotes=True)
def gelu(x: Array, approximate: str = "none") -> Array:
    return jax.nn.gelu(x, approximate={"none": False, "tanh": True}[approximate])


@operation("softplus", promotes=True)
def softplus(x: Array, beta: float = 1, threshold: float = 20) -> Array:
    return jnp.where(x * beta > threshold, x, jnp.logaddexp(x * beta, 0) / beta)


@operation("elu", promotes=True)
def elu(x: Array, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Array:
    return scale * jnp.where(x > 0, x, alpha * jnp.expm1(jnp.minimum(x, 0) * input_scale))


@operation("leaky_relu", promotes=True)
def leaky_relu(x: Array, negative_slope: float = 0.01) -> Array:
    return jnp.where(x > 0, x, negative_slope * x)


@operation("hardtanh", promotes=True)
def hardtanh(x: Array, min_val: float = -1, max_val: float = 1) -> Array:
    return jnp.clip(x, min_val, max_val)


@operation("where")
def where(condition: Array, a: Any, b: Any, /) -> Array:
    return jnp.where(condition, a, b)


@operation("masked_fill")
def masked_fill(x: Array, mask: Array, value: Any) -> Array:
    return jnp.where(mask, jnp.asarray(value, x.dtype), x)


@operation("_to_copy", "prims::convert_element_type")
def to_copy(x: Array, dtype: Any = None) -> Array:
    return x if dtype is None else x.astype(dtype)


@operation("alias", "clone", "contiguous", "detach", "dropout", "lift_fresh", "lift_fresh_copy", "resolve_conj")
def same(x: Array, p: float = 0.0, train: bool = False) -> Array:
    if train and p:
        raise NotImplementedError("dropout while training")
    return x


@operation("copy")
def copy(x: Array, source: Array, non_blocking: bool = False) -> Array:
    return jnp.broadcast_to(source, x.shape).astype(x.dtype)

"""`int4_matmul` and `grouped_int4_matmul`: what `chooser` chooses, as operations that jax knows."""

from __future__ import annotations

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from awq_jax.kernels import custom_rules as rules
from awq_jax.kernels import partitioning as sharded
from awq_jax.kernels.chooser import GROUPED, IMPLEMENTATIONS, TRIED, choose, named
from awq_jax.kernels.contract import PackedWeight, check_shapes
from awq_jax.kernels.gpu import OLDEST, architecture, for_each_architecture
from awq_jax.kernels.implementation import Implementation, Matmul
from awq_jax.kernels.packing import INT4, TILES, Packing
from awq_jax.kernels.triton import launch
from awq_jax.kernels.triton import matmul as triton
from awq_jax.kernels.xla import dense


@for_each_architecture
def operation(implementation: Implementation, name: str | None, dtype: Any) -> Matmul:
    """`matmul(x, w)` by an implementation, in one program for CUDA and others unless it was asked for by name."""
    plain = ft.partial(dense.matmul, dtype=dtype)
    if implementation is dense.XLA:
        return plain
    kernel = ft.partial(implementation.matmul, dtype=dtype)
    if implementation.is_custom_call:
        kernel = ft.partial(sharded.matmul, implementation.matmul, dtype=dtype)
        kernel = kernel if name else rules.everywhere(kernel, plain)
    return rules.with_rules(kernel, plain, ft.partial(_int4_matmul, implementation=name, dtype=dtype))


@for_each_architecture
def grouped_operation(implementation: Implementation, name: str | None, dtype: Any) -> Matmul:
    """As `operation`, of sorted rows."""
    plain = ft.partial(dense.grouped_matmul, dtype=dtype)
    if implementation is dense.GROUPED:
        return plain
    kernel = ft.partial(sharded.grouped_matmul, implementation.matmul, dtype=dtype)
    return kernel if name else rules.with_rules_of(plain, rules.everywhere(kernel, plain))


def int4_matmul(
    x: Float[Array, "*b i"], w: PackedWeight, *, implementation: str | None = None, dtype: Any = None
) -> Float[Array, "*b o"]:
    """`x @ w.dequantize()` without keeping the dense weight; accumulates in float32.

    Args:
      x: float16, bfloat16 or float32 activations; leading axes of w, if any, are leading axes of x too.
      w: packed weight of logical shape (*lead, i, o), 2 to 8 bits; its input scale is applied to x.
      implementation: "triton", "mosaic", "direct" or "xla"; None takes what is thought fastest of those that support
        the case.
      dtype: of the result, float32, bfloat16 or float16; None for x's.

    Raises:
      ValueError: the last axis of x is not w's input axis, its leading axes are not w's, the weight's leaves disagree,
        or no such implementation.
      NotImplementedError: the named implementation cannot run this case; the message says why.

    Reads i * o / 2 bytes of codes and 3 i * o / group of scales and zeros: their bytes are the time up to some 60 rows.
    """
    check_shapes(x, w)
    return _int4_matmul(x, w, implementation, result_dtype(dtype))


def _int4_matmul(x: Any, w: PackedWeight, implementation: str | None, dtype: Any) -> Any:
    found = choose(TRIED, x, w) if implementation is None else named(IMPLEMENTATIONS, implementation, x, w)
    return operation(found, implementation, dtype)(x, w)


def shared_int4_matmul(x: Float[Array, "*b i"], *ws: PackedWeight) -> tuple[Float[Array, "*b o"], ...]:
    """`int4_matmul` of x with each of ws; in one launch where x has few rows and there is one device."""
    try:
        return in_one_launch(x, *ws)
    except NotImplementedError:
        return separate(x, *ws)


def in_one_launch(x: Float[Array, "*b i"], *ws: PackedWeight) -> tuple[Float[Array, "*b o"], ...]:
    """`int4_matmul` of x with each of ws, two or three; vmap and gradients are those of separate matmuls.

    Raises:
      NotImplementedError: one launch cannot run this case; the message says why.
    """
    for w in ws:
        check_shapes(x, w)
    if jax.device_count() > 1:
        raise NotImplementedError("among several devices XLA may have cut the weights, and cannot cut a launch")
    if reason := triton.refuses_shared(x, *ws):
        raise NotImplementedError(reason)
    return together()(x, *ws)


@for_each_architecture
def together() -> Matmul:
    """The matmul of several weights in one launch."""
    plain = lambda x, *ws: tuple(dense.matmul(x, w) for w in ws)
    return rules.with_rules_of(separate, rules.everywhere(triton.shared_matmul, plain))


def separate(x: Float[Array, "*b i"], *ws: PackedWeight) -> tuple[Float[Array, "*b o"], ...]:
    return tuple(int4_matmul(x, w) for w in ws)


def grouped_int4_matmul(
    x: Float[Array, "m i"],
    w: PackedWeight,
    group_sizes: Int[Array, " e"],
    *,
    implementation: str | None = None,
    dtype: Any = None,
) -> Float[Array, "m o"]:
    """Sorted rows, each times the matrix of its group (expert), as jax.lax.ragged_dot; rows beyond all groups give 0.

    Args:
      x: float16, bfloat16 or float32; the first group_sizes[0] rows belong to the first group, and so on.
      w: packed weight of logical shape (e, i, o), 2 to 8 bits.
      implementation: "triton" or "xla"; None takes the first that supports the case.
      dtype: of the result, as in `int4_matmul`.

    Raises:
      ValueError: the last axis of x is not w's input axis, the weight's leaves disagree, or no such
        implementation.
      NotImplementedError: the named implementation cannot run this case; the message says why.
    """
    check_shapes(x, w, grouped=True)
    if jnp.shape(group_sizes) != w.codes.shape[:1] or not jnp.issubdtype(jnp.result_type(group_sizes), jnp.integer):
        found = f"{jnp.result_type(group_sizes)} of shape {jnp.shape(group_sizes)}"
        raise ValueError(f"group_sizes are {found}: give one integer for each of the {w.codes.shape[0]} experts.")
    dtype = result_dtype(dtype)
    found = choose(GROUPED, x, w) if implementation is None else named(GROUPED, implementation, x, w)
    return grouped_operation(found, implementation, dtype)(x, w, group_sizes)


def best_packing() -> Packing:
    """How 4-bit codes are best packed here: in tiles for the Triton kernels, as int4 where XLA alone has to read them.

    Where that was seen to spare the dense weight: TPUs, and NVIDIA GPUs on which the kernels cannot run.
    """
    arch = architecture()
    no_kernels = arch is not None and (arch < OLDEST or launch.missing() is not None)
    return INT4 if no_kernels or jax.default_backend() == "tpu" else TILES


def result_dtype(dtype: Any) -> Any:
    """`dtype` as numpy names it, or None.

    Raises:
      ValueError: no dtype that a matmul writes.
    """
    found = None if dtype is None else jnp.dtype(dtype)
    if found is not None and found.name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={found.name}: a result is float32, bfloat16 or float16. Cast it after.")
    return found

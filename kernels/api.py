"""`int4_matmul` and `grouped_int4_matmul`: the first implementation that can run a case runs it."""

from __future__ import annotations

import functools as ft
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from awq_jax.kernels import custom_rules as rules
from awq_jax.kernels import partitioning as sharded
from awq_jax.kernels.contract import PackedWeight, check_shapes
from awq_jax.kernels.gpu import OLDEST, architecture, for_each_architecture
from awq_jax.kernels.mosaic import matmul as mosaic
from awq_jax.kernels.packing import INT4, TILES, Packing
from awq_jax.kernels.tilings import table
from awq_jax.kernels.triton import launch
from awq_jax.kernels.triton import matmul as triton
from awq_jax.kernels.xla import dense as reference
from awq_jax.kernels.xla import int4 as direct

Implementation = Callable[..., Any]

Table = Mapping[str, tuple[Implementation, Implementation]]
"""By name, in the order in which they are tried. Asked for by name the second runs: no choice of platforms.

"xla" takes every case; what comes after it runs where it is asked for, or where the table hands a case to it.
"""


@for_each_architecture
def implementations(dtype: Any) -> Table:
    """Of a matmul whose result has a dtype; None for x's."""

    def cut(check: Callable[..., None], kernel: Implementation, x: Any, w: PackedWeight) -> Array:
        check(x.dtype, w)
        return sharded.matmul(kernel, x, w, dtype=dtype)

    kernel = ft.partial(cut, triton.check, triton.matmul)
    named = ft.partial(cut, triton.check, ft.partial(triton.matmul, lookup=table.triton_tiling))
    plain = ft.partial(reference.matmul, dtype=dtype)
    hopper = rules.with_rules(ft.partial(cut, mosaic.check, mosaic.matmul), plain, fail)
    read = rules.with_rules(ft.partial(direct.matmul, dtype=dtype), plain, fail)
    return {
        "triton": (
            rules.with_rules(rules.everywhere(kernel, plain), plain, lambda e: tell_slow([f"triton: {e}"])),
            rules.with_rules(named, plain, fail),
        ),
        "direct": (read, read),
        "xla": (plain, plain),
        "mosaic": (hopper, hopper),
    }


@for_each_architecture
def grouped_implementations(dtype: Any) -> Table:
    """As `implementations`, of sorted rows."""
    kernel = ft.partial(sharded.grouped_matmul, triton.grouped_matmul, dtype=dtype)
    plain = ft.partial(reference.grouped_matmul, dtype=dtype)
    return {"triton": (rules.with_rules_of(plain, rules.everywhere(kernel, plain)), kernel), "xla": (plain, plain)}


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
    return first_that_can(implementations(result_dtype(dtype)), implementation, x, w)


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
    return together()(x, *ws)


@for_each_architecture
def together() -> Implementation:
    """The matmul of several weights in one launch."""
    plain = lambda x, *ws: tuple(reference.matmul(x, w) for w in ws)
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
    return first_that_can(grouped_implementations(result_dtype(dtype)), implementation, x, w, group_sizes)


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


def first_that_can(table: Table, name: str | None, *args: Any) -> Float[Array, "*b o"]:
    """What the named implementation returns, or the first of all that does not refuse."""
    if name is not None:
        if name not in table:
            raise ValueError(f"implementation={name!r}: choose one of {sorted(table)} or None.")
        return table[name][1](*args)
    reasons: list[str] = []
    for name, (implementation, _) in table.items():
        try:
            out = implementation(*args)
        except NotImplementedError as e:
            reasons.append(f"{name}: {e}")
            continue
        if reasons:
            tell_slow(reasons)
        return out
    raise NotImplementedError("No implementation runs this int4 matmul. " + "; ".join(reasons))


def fail(reason: NotImplementedError) -> None:
    raise reason


def tell_slow(reasons: Sequence[str]) -> None:
    """What runs on a GPU instead of a kernel, and why."""
    if jax.default_backend() == "gpu":
        tell(f"int4 matmul runs as plain XLA, slower than it could. {'; '.join(reasons)}.")


@ft.cache
def tell(message: str) -> None:
    """Warns, once for each message."""
    warnings.warn(message, stacklevel=4)

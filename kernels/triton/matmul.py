"""The matmul by the Triton kernels: NVIDIA GPUs, 4-bit weights in tiles.

From compute capability 8.0 on bfloat16 and float16 are multiplied on the tensor cores. On 7.5, and in float32 anywhere,
a few rows (decode) are multiplied without them; more are left to plain XLA, which makes the weight dense. So is a long
prefill, where the table says so: a weight made dense once is then cheaper than one unpacked for every tile of rows.

The input scale is multiplied into x before, by XLA, which does it where x is made: in a kernel's loop it would be done
again for every tile of columns, and cost more instructions than the weights.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from awq_jax.kernels.arithmetic import scaled
from awq_jax.kernels.contract import PackedWeight, not_in_tiles, sizes
from awq_jax.kernels.gpu import OLDEST, TENSOR_CORES, architecture, multiprocessors
from awq_jax.kernels.implementation import Implementation
from awq_jax.kernels.packing.tiles import BLOCK
from awq_jax.kernels.tilings import table
from awq_jax.kernels.tilings.table import Case, Tiling
from awq_jax.kernels.triton.launch import launch, unavailable

MOST_EXPERTS = 65535


def unread(dtype: Any, w: PackedWeight) -> str | None:
    """Why the kernels read no such w, or x of this dtype, on any number of rows."""
    if reason := not_in_tiles(w):
        return reason
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"x is {jnp.dtype(dtype)}, the kernels take bfloat16, float16 or float32: cast x"
    arch = architecture()
    return f"the GPU is sm_{arch}, Triton compiles from sm_{OLDEST}" if arch is not None and arch < OLDEST else None


def refuses(x: Any, w: PackedWeight, tiling: Tiling | None = None) -> str | None:
    """Why the kernels cannot multiply w with x, with a tiling or the one they take themselves."""
    if reason := unread(x.dtype, w):
        return reason
    if 0 in sizes(x, w):
        return None
    if (experts := sizes(x, w)[0]) > MOST_EXPERTS:
        return f"{experts} matrices at once: a grid of programs has {MOST_EXPERTS} in its last axis"
    known = tiling or own_tiling(x, w)
    return unavailable(known.kernel) if known else table.too_many_rows(architecture() or TENSOR_CORES, x.dtype.name)


def own_tiling(x: Any, w: PackedWeight) -> Tiling | None:
    """The one that is taken where none is given, also where another implementation would be faster."""
    _, rows, k, n = sizes(x, w)
    return table.triton_tiling(architecture() or TENSOR_CORES, x.dtype.name, w.spec.group(k), rows, k, n)


def matmul(
    x: Float[Array, "*b i"],
    w: PackedWeight,
    *,
    layer: Int[Array, ""] | None = None,
    dtype: Any = None,
    tiling: Tiling | None = None,
) -> Float[Array, "*b o"]:
    """`x @ w`, batched over the weight's leading axes; float32 accumulators.

    Args:
      x: bfloat16, float16 or float32; the weight's leading axes are leading axes of x too.
      w: 4 bits, in tiles.
      layer: w has an axis of layers in front, and this one is meant. It is read in place: a slice handed to a
        custom call would be copied by XLA.
      dtype: of the result; None for x's.
      tiling: of one of these kernels; None for the table's.

    Raises:
      NotImplementedError: the kernels cannot run this case; the message says why.
      ValueError: the tiling takes more shared memory than the GPU has.
    """
    one = w if layer is None else jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), w)
    if reason := refuses(x, one, tiling):
        raise NotImplementedError(reason)
    experts, rows, k, n = sizes(x, one)
    dtype = jnp.dtype(dtype or x.dtype)
    t = tiling or own_tiling(x, one)
    if t is None or 0 in (experts, rows, k, n):
        return jnp.zeros((*x.shape[:-1], n), dtype)
    arch = architecture() or TENSOR_CORES
    if not t.fits(arch):
        raise ValueError(
            f"{t} takes {t.shared(arch)} bytes of shared memory, sm_{arch} has {table.limit(arch)}: "
            f"lower stages, or leave it to the table, which gives {own_tiling(x, one)}."
        )
    n_tiles, m_tiles, blocks = -(-n // t.bn), -(-rows // t.bm), -(-k // BLOCK)
    many = t.kernel == "tile"
    splits = table.splits(n_tiles * m_tiles * experts, blocks, multiprocessors()) if many else 1
    grid = {"decode": (n_tiles, m_tiles), "tile": (n_tiles * m_tiles, splits), "gemv": (m_tiles, n_tiles)}[t.kernel]
    tile_sizes = {"bm": t.bm, "bn": t.bn, "kb": min(t.kb, table.power_of_two(blocks)), "splits": splits}
    unused = {"decode": ("splits",), "tile": ("kb",), "gemv": ("bm", "f16", "splits")}[t.kernel]
    scale = w.input_scale if layer is None or w.input_scale is None else w.input_scale[layer]
    y = launch(
        t.kernel,
        scaled(x, scale),
        *pointers(w),
        w.scales if layer is None else jnp.asarray(layer, jnp.int32)[None],
        out=jax.ShapeDtypeStruct((experts, splits, rows, n), dtype if splits == 1 else jnp.float32),
        grid=(*grid, experts),
        warps=t.warps,
        stages=t.stages,
        M=rows,
        layered=layer is not None,
        E=experts,
        **{name: value for name, value in (tile_sizes | constants(x, w)).items() if name not in unused},
    )
    return y.sum(1).astype(dtype).reshape(*x.shape[:-1], n)


def refuses_shared(x: Any, *ws: PackedWeight) -> str | None:
    """Why one launch cannot multiply x with each of ws."""
    if reason := next(filter(None, (unread(x.dtype, w) for w in ws)), None):
        return reason
    rows, k, ns = math.prod(x.shape[:-1]), x.shape[-1], [w.scales.shape[-1] for w in ws]
    alike = {(w.in_features, w.spec.group(k), w.zeros is None, w.codes.ndim) for w in ws}
    if len(ws) not in (2, 3) or alike != {(k, ws[0].spec.group(k), ws[0].zeros is None, 2)} or 0 in (rows, k, *ns):
        return "one launch multiplies two or three matrices with the same groups"
    t = shared_tiling(x, *ws)
    if t is None:
        return table.too_many_rows(architecture() or TENSOR_CORES, x.dtype.name)
    return unavailable(t.kernel) if t.kernel == "decode" else "one launch multiplies few rows, on the tensor cores"


def shared_tiling(x: Any, *ws: PackedWeight) -> Tiling | None:
    """The table's for one weight as wide as all of them."""
    rows, k, n = math.prod(x.shape[:-1]), x.shape[-1], sum(w.scales.shape[-1] for w in ws)
    return table.tiling(architecture() or TENSOR_CORES, x.dtype.name, ws[0].spec.group(k), rows, k, n)


def shared_matmul(x: Float[Array, "*b i"], *ws: PackedWeight) -> tuple[Float[Array, "*b o"], ...]:
    """`x @ w` for each of two or three weights, few rows of x, in one launch: narrow weights fill a GPU together.

    Raises:
      NotImplementedError: one launch cannot run this case; the message says why.
    """
    if reason := refuses_shared(x, *ws):
        raise NotImplementedError(reason)
    t = shared_tiling(x, *ws)
    assert t
    rows, k, ns = math.prod(x.shape[:-1]), x.shape[-1], [w.scales.shape[-1] for w in ws]
    padded = [*ws, ws[-1]][:3]
    ns = [*ns, 0][:3]
    fixed = {name: value for name, value in constants(x, ws[0]).items() if name != "N"}
    ys = launch(
        "decode_shared",
        *(a for w in padded for a in (scaled(x, w.input_scale), *pointers(w))),
        out=tuple(jax.ShapeDtypeStruct((rows, max(n, 1)), x.dtype) for n in ns),
        grid=(sum(-(-n // t.bn) for n in ns), -(-rows // t.bm), 1),
        warps=t.warps,
        stages=t.stages,
        M=rows,
        **{f"N{i}": n for i, n in enumerate(ns)},
        bm=t.bm,
        bn=t.bn,
        kb=min(t.kb, table.power_of_two(-(-k // BLOCK))),
        **fixed,
    )
    return tuple(y.reshape(*x.shape[:-1], n) for y, n in zip(ys, ns, strict=True) if n)


def refuses_grouped(x: Any, w: PackedWeight, tiling: Tiling | None = None) -> str | None:
    """Why the kernel cannot multiply sorted rows of x with the matrices of w."""
    del tiling
    if reason := unread(x.dtype, w):
        return reason
    arch = architecture() or TENSOR_CORES
    if arch < TENSOR_CORES or x.dtype == jnp.float32:
        return f"sorted rows of {x.dtype} on sm_{arch} would need tensor cores that take them{table.remedy(arch)}"
    return None if 0 in (*x.shape, *w.scales.shape) else unavailable("ragged")


def grouped_matmul(
    x: Float[Array, "m i"], w: PackedWeight, group_sizes: Int[Array, " e"], *, dtype: Any = None
) -> Float[Array, "m o"]:
    """Sorted rows, each times its group's matrix, as jax.lax.ragged_dot; rows beyond all groups give 0.

    In x's dtype, or the one given.

    Raises:
      NotImplementedError: the kernels cannot run this case; the message says why.
    """
    if reason := refuses_grouped(x, w):
        raise NotImplementedError(reason)
    experts, (rows, k), n = w.codes.shape[0], x.shape, w.scales.shape[-1]
    dtype = jnp.dtype(dtype or x.dtype)
    if 0 in (experts, rows, n, k):
        return jnp.zeros((rows, n), dtype)
    t = table.grouped_tiling(architecture() or TENSOR_CORES, x.dtype.name, w.spec.group(k), -(-rows // experts), n)
    which = row_tiles(group_sizes, rows, t.bm)
    if w.input_scale is not None:
        owner = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows), side="right")
        x = scaled(x, w.input_scale[jnp.minimum(owner, experts - 1)])
    return launch(
        "ragged",
        x,
        *pointers(w),
        *which,
        out=jax.ShapeDtypeStruct((rows, n), dtype),
        grid=(which[0].size, -(-n // t.bn), 1),
        warps=t.warps,
        stages=t.stages,
        M=rows,
        E=experts,
        bm=t.bm,
        bn=t.bn,
        **constants(x, w),
    )


def row_tiles(group_sizes: Int[Array, " e"], rows: int, bm: int) -> tuple[Int[Array, " t"], ...]:
    """Tiles of at most bm rows, none across two groups: group, first row and end of the group of each.

    The rows beyond all groups are tiles of group -1. As many tiles as any sizes need; those not needed are empty. Of
    sizes that add up to more than `rows` the last rows are not there.
    """
    ends = jnp.append(jnp.minimum(jnp.cumsum(jnp.asarray(group_sizes, jnp.int32)), rows), rows).astype(jnp.int32)
    sizes = jnp.diff(ends, prepend=0)
    counts = -(-sizes // bm)
    last = jnp.cumsum(counts)
    t = jnp.arange(-(-rows // bm) + sizes.size, dtype=jnp.int32)
    group = jnp.searchsorted(last, t, side="right").astype(jnp.int32)
    at = jnp.minimum(group, sizes.size - 1)
    first = ends[at] - sizes[at] + (t - (last[at] - counts[at])) * bm
    used = group < sizes.size
    return (
        jnp.where(group < sizes.size - 1, group, -1),
        jnp.where(used, first, rows).astype(jnp.int32),
        jnp.where(used, ends[at], rows).astype(jnp.int32),
    )


def pointers(w: PackedWeight) -> tuple[Array, ...]:
    """codes, scales, zeros; the scales again for zeros that the weight lacks, which the kernel will not read."""
    return (
        w.codes,
        w.scales,
        w.scales if w.zeros is None else w.zeros,
    )


def constants(x: Float[Array, "*b i"], w: PackedWeight) -> dict[str, Any]:
    return {
        "N": w.scales.shape[-1],
        "K": w.in_features,
        "G": w.spec.group(w.in_features),
        "asymmetric": w.zeros is not None,
        "f16": x.dtype == jnp.float16,
        "asm": True,
    }


def worth_timing(tiling: Tiling, case: Case) -> bool:
    """Whether a tiling may be the fastest of a case."""
    return tiling.bm == max(8, case.m) if tiling.kernel == "decode" else tiling.kernel == "tile" and case.m > 16


def described(x: Any, w: PackedWeight, tiling: Tiling | None) -> str:
    """Which kernel runs, in words."""
    t = tiling or own_tiling(x, w)
    return f"Triton, {t.kernel} {t.bm} x {t.bn}" if t else "Triton"


TRITON = Implementation("triton", refuses, matmul, table.TRITON, worth_timing, described, is_custom_call=True)
GROUPED = Implementation("triton", refuses_grouped, grouped_matmul, is_custom_call=True)

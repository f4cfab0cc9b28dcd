"""The matmul of many rows for Hopper, in Pallas Mosaic GPU: y^T = w^T x^T, the weight from registers.

One warpgroup copies by TMA what two others multiply by wgmma, 64 columns of the weight each: one unpacks codes while
the tensor cores work for the other. Programs are as many as multiprocessors and take tile after tile, so that copies
for the next tile run during the store of the last. Arithmetic and roundings are those of `tile` in triton/kernels.py:
one `lop3` makes two weights of two nibbles (there it says how), the scale is multiplied into the weight.
"""

from __future__ import annotations

import functools as ft
from typing import Any, cast

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int16, UInt8

from awq_jax.kernels.mosaic.matmul import COLUMNS
from awq_jax.kernels.packing.tiles import BLOCK, PLANE, PLANES

WARPGROUPS = 2
STORED = 64
"""Rows of the result that are on their way to memory at once."""
COPYING_REGISTERS = 40
PER_COLUMN = plgpu.Layout.WGMMA.reduce(1)


def magic(dtype: Any) -> int:
    """The bits of 128 in bfloat16, of 1024 in float16: in the lowest four lies the code."""
    return 0x4300 if dtype == jnp.bfloat16 else 0x6400


def lifted(words: Int16[Array, "n 32"], plane: int, dtype: Any) -> Float[Array, "n 32"]:
    """128 + the codes of a plane in bfloat16, 1024 + codes in float16."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    result = plgpu.ShapeDtypeStruct(words.shape, dtype, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=result)
    def lift(_: Any, words: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get())

        def two(register: Any) -> Any:
            bits = llvm.bitcast(i32, register)
            if plane:
                bits = arith.shrui(bits, arith.constant(i32, ir.IntegerAttr.get(i32, 4 * plane)))
            lop3 = f"lop3.b32 $0, $1, 0x000f000f, {magic(dtype) * 0x10001}, 0xEA;"
            return llvm.bitcast(pair, cast(Any, llvm.inline_asm(i32, [bits], lop3, "=r,r")))

        return words._pointwise(two)

    return cast(Any, lift)(words)


def swizzled(dtype: Any, width: int) -> tuple[Any, ...]:
    """How a matrix of rows of `width` elements lies in shared memory so that no two threads want the same bank."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(min(width * bits, 1024))
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def product(
    x: Float[Array, "e m k"],
    codes: Int16[Array, "e blocks n 32"],
    scales: Float[Array, "e groups n"],
    zeros: UInt8[Array, "e groups n"] | None,
    *,
    group: int,
    bm: int,
    stages: int,
    programs: int,
    dtype: Any,
) -> Float[Array, "e m n"]:
    """x times the weight, for each e; `programs` of tiles of bm rows and 128 columns."""
    (experts, m, k), n = x.shape, scales.shape[-1]
    bn = WARPGROUPS * COLUMNS
    rows, columns = -(-m // bm), -(-n // bn)
    in_block = max(1, BLOCK // group)
    per_group = plgpu.BlockSpec((in_block, bn), lambda p: (p * BLOCK // (group * in_block), 0))
    specs = [
        plgpu.BlockSpec((bm, BLOCK), lambda p: (0, p), transforms=swizzled(x.dtype, PLANE)),
        plgpu.BlockSpec((None, bn, PLANE), lambda p: (p, 0, 0), transforms=swizzled(codes.dtype, PLANE)),
        per_group,
    ] + [per_group] * (zeros is not None)
    stored = min(bm, STORED)
    parts = bm // stored

    def awq_mosaic(*refs: Any, staged: Any) -> None:
        *ins, out = refs

        def pipeline(body: Any, context: Any) -> Any:
            return plgpu.emit_pipeline_warp_specialized(
                body,
                grid=(k // BLOCK,),
                in_specs=specs,
                max_concurrent_steps=stages,
                wg_axis="warpgroup",
                num_compute_wgs=WARPGROUPS,
                memory_registers=COPYING_REGISTERS,
                compute_context=context,
            )

        buffers = pipeline(lambda *_: None, lambda *_: None).get_allocations(*(a.at[0] for a in ins))

        @ft.partial(pl.run_scoped, buffers=buffers, collective_axes="warpgroup")
        def _(buffers: Any) -> None:
            warpgroup = lax.axis_index("warpgroup")
            mine = pl.ds(warpgroup * COLUMNS, COLUMNS)

            @plgpu.nd_loop((experts, rows * columns), collective_axes="program")
            def _(loop: Any) -> None:
                e, tile = loop.index
                i, j = plgpu.planar_snake(tile, (rows, columns), 0, 8)
                here = pl.ds(j * bn, bn)

                def multiply(_: Any, x: Any, codes: Any, scales: Any, *rest: Any) -> Any:
                    *zeros, sums = rest
                    words = plgpu.layout_cast(codes[mine], plgpu.Layout.WGMMA)
                    spread = lambda a: lax.broadcast_in_dim(a, (COLUMNS, PLANE), (0,))
                    for g in range(in_block):
                        scale = plgpu.layout_cast(scales[g, mine], PER_COLUMN).astype(x.dtype)
                        zero = jnp.full((COLUMNS,), 8, jnp.int16)
                        if zeros:
                            zero = plgpu.layout_cast(zeros[0][g, mine], PER_COLUMN).astype(jnp.int16)
                        zero = lax.bitcast_convert_type(zero | jnp.int16(magic(x.dtype)), x.dtype)
                        for plane in range(g * PLANES // in_block, (g + 1) * PLANES // in_block):
                            w = (lifted(words, plane, x.dtype) - spread(zero)) * spread(scale)
                            plgpu.wgmma(sums, w, x.at[:, pl.ds(PLANE * plane, PLANE)].T)
                    plgpu.wgmma_wait(0)
                    return sums

                def store(run: Any) -> None:
                    @ft.partial(pl.run_scoped, sums=plgpu.WGMMAAccumulatorRef((COLUMNS, bm), jnp.float32))
                    def _(sums: Any) -> None:
                        run(sums)
                        y = plgpu.layout_cast(sums[...].astype(dtype), plgpu.Layout.WGMMA)
                        for part in range(parts):
                            place = staged.at[warpgroup, part % 2]
                            # What was there before is read: two parts ago, of the last tile if there are not so many.
                            plgpu.wait_smem_to_gmem(1 - parts % 2, wait_read_only=True)
                            piece = y[:, part * stored : (part + 1) * stored]
                            place.T[...] = plgpu.layout_cast(piece, plgpu.Layout.WGMMA_TRANSPOSED)
                            plgpu.commit_smem()
                            where = pl.ds(i * bm + part * stored, stored)
                            plgpu.copy_smem_to_gmem(place, out.at[e, where, here].at[:, mine])

                first, *others = (a.at[e] for a in ins)
                cut = (a.at[:, here] for a in others)
                pipeline(multiply, store)(first.at[pl.ds(i * bm, bm)], *cut, allocations=buffers)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        awq_mosaic,
        out_type=jax.ShapeDtypeStruct((experts, m, n), dtype),
        grid=(min(programs, experts * rows * columns),),
        grid_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        scratch_types={
            "staged": plgpu.SMEM((WARPGROUPS, 2, stored, COLUMNS), dtype, transforms=swizzled(dtype, COLUMNS))
        },
    )(x, codes, scales, *([] if zeros is None else [zeros]))

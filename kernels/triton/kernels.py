"""The matmul kernels, in Triton: y^T = w^T x^T, the weight as the left operand of the tensor cores.

The left operand goes from memory through shared memory to registers, where one `lop3` makes two weights of two
nibbles, and from there to the tensor cores: it is never written back. The trick: 0x4300 | q read as bfloat16 is
128 + q, 0x6400 | q read as float16 is 1024 + q, both exact; so is the difference to 128 + z or 1024 + z.

`decode` is for few rows of x, where the bytes of the weight are the time. One program owns `bn` columns and all of
K; its warps take different blocks of K and add up at the end (split-K without a second kernel). Scales multiply the
float32 sums of a group, not the weights: the integers q - z enter the tensor cores exactly.

`tile` is for many rows, where the tensor cores are the time: one accumulator, scales multiplied into the weight, both
in x's dtype. Two roundings a weight. Where tiles are fewer than multiprocessors, K is split among programs; XLA adds
their float32 sums where the result is used.

`gemv` is for few rows where there are no tensor cores, for a GPU of sm_75 or for float32.

Nothing here imports jax. Sizes are compile-time constants. With `asm=False` the same arithmetic is written as the
interpreter runs it: no inline assembly, bfloat16 computed in float32 and rounded. So that a second copy of this
module can be interpreted while the first compiles, it calls none of the functions of triton.language that are
themselves jitted: neither `zeros` nor `sum`.
"""

# Triton's own types do not know that constants become constexpr and that static_range is iterated.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl


@triton.jit
def planes(words, f16: tl.constexpr, asm: tl.constexpr):
    """The four planes of int16 words, each 128 + q in bfloat16 or 1024 + q in float16."""
    if asm:
        if f16:
            return tl.inline_asm_elementwise(
                """{ .reg .b32 t;
                lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA;
                shr.u32 t, $4, 4;  lop3.b32 $1, t, 0x000F000F, 0x64006400, 0xEA;
                shr.u32 t, $4, 8;  lop3.b32 $2, t, 0x000F000F, 0x64006400, 0xEA;
                shr.u32 t, $4, 12; lop3.b32 $3, t, 0x000F000F, 0x64006400, 0xEA; }""",
                "=r,=r,=r,=r,r",
                [words],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            return tl.inline_asm_elementwise(
                """{ .reg .b32 t;
                lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
                shr.u32 t, $4, 4;  lop3.b32 $1, t, 0x000F000F, 0x43004300, 0xEA;
                shr.u32 t, $4, 8;  lop3.b32 $2, t, 0x000F000F, 0x43004300, 0xEA;
                shr.u32 t, $4, 12; lop3.b32 $3, t, 0x000F000F, 0x43004300, 0xEA; }""",
                "=r,=r,=r,=r,r",
                [words],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
    else:
        return (
            magic(words & 15, f16),
            magic((words >> 4) & 15, f16),
            magic((words >> 8) & 15, f16),
            magic((words >> 12) & 15, f16),
        )


@triton.constexpr_function
def span(k, group):
    """How many rows of a block of 128 surely share a group: a power of two, 32 or more."""
    return 128 if group >= k else min(128, group & -group)


@triton.constexpr_function
def stored(k, group):
    """How many blocks of 128 rows a matrix takes in memory: groups are whole, so the last may need another block."""
    return ((k + group - 1) // group * group + 127) // 128


@triton.jit
def ask_for(rows, groups: tl.constexpr, N: tl.constexpr, n, bn: tl.constexpr):
    """Columns n .. n + bn of rows (groups, N) are on their way into the L2 cache.

    Scales and zeros are too narrow for the copies that Triton issues rounds ahead: without this each round of a loop
    would wait for memory.
    """
    g = tl.arange(0, power_of_two(groups))
    column = tl.minimum(n + 16 * tl.arange(0, bn // 16), N - 1)
    place = tl.minimum(g, groups - 1)[:, None] * N + column[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [rows + place], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.constexpr_function
def power_of_two(n):
    return 1 << (n - 1).bit_length()


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def wide(a, asm: tl.constexpr):
    """In float32. The interpreter's own conversions of bfloat16 are not exact: its bits are shifted instead."""
    if asm or a.dtype != tl.bfloat16:
        return a.to(tl.float32)
    else:
        return (a.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def narrow(a, dtype: tl.constexpr, asm: tl.constexpr):
    """A float32 rounded to the nearest even of a shorter dtype."""
    if asm or dtype != tl.bfloat16:
        return a.to(dtype)
    else:
        bits = a.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def minus(a, b, asm: tl.constexpr):
    if asm:
        return a - b
    else:
        return narrow(wide(a, asm) - wide(b, asm), a.dtype, asm)


@triton.jit
def times(a, b, asm: tl.constexpr):
    if asm:
        return a * b
    else:
        return narrow(wide(a, asm) * wide(b, asm), a.dtype, asm)


@triton.jit
def dot(a, b, acc, asm: tl.constexpr):
    if asm:
        return tl.dot(a, b, acc)
    else:
        return tl.dot(wide(a, asm), wide(b, asm), acc, input_precision="ieee")


@triton.jit
def magic(codes, f16: tl.constexpr):
    """128 + codes in bfloat16 or 1024 + codes in float16, without a conversion."""
    if f16:
        return (codes.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
    else:
        return (codes.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True)


@triton.jit
def matrices(layer, E: tl.constexpr, layered: tl.constexpr):
    """Which matrix of x and of the result a program of the third axis works on, and which of the weight."""
    e = tl.program_id(2).to(tl.int64)
    ew = e
    if layered:
        ew = e + tl.load(layer).to(tl.int64) * E
    return e, ew


@triton.jit
def decode(
    x,
    codes,
    scales,
    zeros,
    layer,
    out,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    asymmetric: tl.constexpr,
    layered: tl.constexpr,
    f16: tl.constexpr,
    bm: tl.constexpr,
    bn: tl.constexpr,
    kb: tl.constexpr,
    asm: tl.constexpr,
):
    """x (E, M, K), codes (E, blocks, N, 32), scales and zeros (E, groups, N) -> out (E, M, N).

    Grid (N / bn, M / bm, E). With `layered` the weight has one more axis in front and layer (1,) says which.
    """
    e, ew = matrices(layer, E, layered)
    few_rows(
        x + e * M * K, codes, scales, zeros, out + e * M * N, ew, tl.program_id(0),
        M, N, K, G, asymmetric, f16, bm, bn, kb, asm,
    )  # fmt: skip


@triton.jit
def decode_shared(
    x0,
    codes0,
    scales0,
    zeros0,
    x1,
    codes1,
    scales1,
    zeros1,
    x2,
    codes2,
    scales2,
    zeros2,
    out0,
    out1,
    out2,
    M: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    asymmetric: tl.constexpr,
    f16: tl.constexpr,
    bm: tl.constexpr,
    bn: tl.constexpr,
    kb: tl.constexpr,
    asm: tl.constexpr,
):
    """As `decode`, for two or three weights without further axes; N2 is 0 where there is no third.

    Grid (N0 / bn + N1 / bn + N2 / bn, M / bm).
    """
    first: tl.constexpr = (N0 + bn - 1) // bn
    second: tl.constexpr = first + (N1 + bn - 1) // bn
    t = tl.program_id(0)
    if t < first:
        few_rows(x0, codes0, scales0, zeros0, out0, 0, t, M, N0, K, G, asymmetric, f16, bm, bn, kb, asm)
    elif t < second:
        few_rows(x1, codes1, scales1, zeros1, out1, 0, t - first, M, N1, K, G, asymmetric, f16, bm, bn, kb, asm)
    elif N2:
        few_rows(x2, codes2, scales2, zeros2, out2, 0, t - second, M, N2, K, G, asymmetric, f16, bm, bn, kb, asm)


@triton.jit
def few_rows(
    x,
    codes,
    scales,
    zeros,
    out,
    e,
    pid_n,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    asymmetric: tl.constexpr,
    f16: tl.constexpr,
    bm: tl.constexpr,
    bn: tl.constexpr,
    kb: tl.constexpr,
    asm: tl.constexpr,
):
    """Rows of x (M, K), of the second axis, times the bn columns of tile pid_n of weight e, into out (M, N)."""
    P: tl.constexpr = (K + 127) // 128
    groups: tl.constexpr = (K + G - 1) // G
    run: tl.constexpr = span(K, G)
    n = pid_n * bn + tl.arange(0, bn)
    m = tl.program_id(1) * bm + tl.arange(0, bm)
    column = n
    if N % bn:
        column = tl.minimum(n, N - 1)
    r = tl.arange(0, 32)
    codes += e * stored(K, G) * N * 32
    scales += e * groups * N
    zeros += e * groups * N
    if asm:
        ask_for(scales, groups, N, pid_n * bn, bn)
        if asymmetric:
            ask_for(zeros, groups, N, pid_n * bn, bn)

    acc = tl.full((kb, bn, bm), 0, tl.float32)
    for t in range((P + kb - 1) // kb):
        p = t * kb + tl.arange(0, kb)
        block = p
        if P % kb:
            block = tl.minimum(p, P - 1)
        words = tl.load(codes + (block[:, None, None] * N + column[None, :, None]) * 32 + r[None, None, :])
        part = tl.full((kb, bn, bm), 0, tl.float32)
        four = planes(words, f16, asm)
        for j in tl.static_range(4):
            k = p[:, None] * 128 + 32 * j + r[None, :]
            inside = (m < M)[None, None, :]
            if K % (128 * kb):
                inside = inside & (k < K)[:, :, None]
            v = tl.load(x + m[None, None, :] * K + k[:, :, None], mask=inside, other=0)
            g = tl.minimum((block * 128 + 32 * j // run * run) // G, groups - 1)
            place = g[:, None] * N + column[None, :]
            z = magic(tl.load(zeros + place) if asymmetric else tl.full((kb, bn), 8, tl.int16), f16)
            part = dot(minus(four[j], z[:, :, None], asm), v, part, asm)
            if 32 * (j + 1) % run == 0:
                acc += part * tl.load(scales + place).to(tl.float32)[:, :, None]
                if j < 3:
                    part = tl.full((kb, bn, bm), 0, tl.float32)
    y = tl.reduce(acc, 0, add)
    tl.store(
        out + m[None, :] * N + n[:, None],
        narrow(y, out.dtype.element_ty, asm),
        mask=(n < N)[:, None] & (m < M)[None, :],
    )


@triton.jit
def gemv(
    x,
    codes,
    scales,
    zeros,
    layer,
    out,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    asymmetric: tl.constexpr,
    layered: tl.constexpr,
    bn: tl.constexpr,
    kb: tl.constexpr,
    asm: tl.constexpr,
):
    """As `decode`, without tensor cores. One program multiplies one row of x, in float32. Grid (M, N / bn, E).

    A code stays where it is in its word: 0x4B000000 | q << 4 j read as float32 is 2**23 + q 2**4j.
    """
    P: tl.constexpr = (K + 127) // 128
    groups: tl.constexpr = (K + G - 1) // G
    run: tl.constexpr = span(K, G)
    e, ew = matrices(layer, E, layered)
    n = tl.program_id(1) * bn + tl.arange(0, bn)
    column = n
    if N % bn:
        column = tl.minimum(n, N - 1)
    r = tl.arange(0, 32)
    x += (e * M + tl.program_id(0)) * K
    codes += ew * stored(K, G) * N * 32
    scales += ew * groups * N
    zeros += ew * groups * N

    acc = tl.full((kb, bn, 32), 0, tl.float32)
    for t in range((P + kb - 1) // kb):
        p = t * kb + tl.arange(0, kb)
        block = p
        if P % kb:
            block = tl.minimum(p, P - 1)
        words = tl.load(codes + (block[:, None, None] * N + column[None, :, None]) * 32 + r[None, None, :])
        words = words.to(tl.uint16, bitcast=True).to(tl.uint32)
        part = tl.full((kb, bn, 32), 0, tl.float32)
        for j in tl.static_range(4):
            k = p[:, None] * 128 + 32 * j + r[None, :]
            v = wide(tl.load(x + k, mask=k < K, other=0) if K % (128 * kb) else tl.load(x + k), asm)
            g = tl.minimum((block * 128 + 32 * j // run * run) // G, groups - 1)
            place = g[:, None] * N + column[None, :]
            z = tl.load(zeros + place).to(tl.uint32) if asymmetric else tl.full((kb, bn), 8, tl.uint32)
            lifted = (words & (15 << 4 * j) | 0x4B000000).to(tl.float32, bitcast=True)
            below = (z | 0x4B000000).to(tl.float32, bitcast=True) - (2.0**23 - 2.0 ** (23 - 4 * j))
            part += (lifted * 2.0 ** (-4 * j) - below[:, :, None]) * v[:, None, :]
            if 32 * (j + 1) % run == 0:
                acc += part * tl.load(scales + place).to(tl.float32)[:, :, None]
                if j < 3:
                    part = tl.full((kb, bn, 32), 0, tl.float32)
    y = tl.reduce(tl.reduce(acc, 2, add), 0, add)
    out += (e * M + tl.program_id(0)) * N
    tl.store(out + n, narrow(y, out.dtype.element_ty, asm), mask=n < N)


@triton.jit
def tile(
    x,
    codes,
    scales,
    zeros,
    layer,
    out,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    asymmetric: tl.constexpr,
    layered: tl.constexpr,
    f16: tl.constexpr,
    bm: tl.constexpr,
    bn: tl.constexpr,
    splits: tl.constexpr,
    asm: tl.constexpr,
):
    """As `decode`, for many rows, out (E, splits, M, N): one product for each part of K.

    Grid (M / bm * N / bn, splits, E).
    """
    P: tl.constexpr = (K + 127) // 128
    e, ew = matrices(layer, E, layered)
    rows: tl.constexpr = (M + bm - 1) // bm
    columns: tl.constexpr = (N + bn - 1) // bn
    pid_m, pid_n = swizzled(tl.program_id(0), rows, columns)
    m = pid_m * bm + tl.arange(0, bm)
    part = tl.program_id(1)
    first, last = 0, P
    if splits > 1:
        first, last = part * P // splits, (part + 1) * P // splits
    product(
        x + e * M * K, codes, scales, zeros, out + (e * splits + part) * M * N, ew, m, m < M, pid_n, first, last,
        N, K, G, asymmetric, f16, bm, bn, asm, M % bm != 0,
    )  # fmt: skip


@triton.jit
def ragged(
    x,
    codes,
    scales,
    zeros,
    experts,
    firsts,
    ends,
    out,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    asymmetric: tl.constexpr,
    f16: tl.constexpr,
    bm: tl.constexpr,
    bn: tl.constexpr,
    asm: tl.constexpr,
):
    """x (M, K) in rows of experts: program t of the first axis multiplies rows firsts[t] .. ends[t] with experts[t].

    Grid (tiles, N / bn). An expert of -1 is a tile of rows beyond all groups: it writes zeros.
    """
    P: tl.constexpr = (K + 127) // 128
    t = tl.program_id(0)
    e = tl.load(experts + t).to(tl.int64)
    m = tl.load(firsts + t) + tl.arange(0, bm)
    product(
        x, codes, scales, zeros, out, tl.maximum(e, 0), m, m < tl.load(ends + t), tl.program_id(1), 0,
        tl.where(e < 0, 0, P), N, K, G, asymmetric, f16, bm, bn, asm, True,
    )  # fmt: skip


@triton.jit
def swizzled(pid, rows: tl.constexpr, columns: tl.constexpr):
    """Row and column of a program such that programs that run together share weights and activations in L2."""
    width: tl.constexpr = 8
    band = pid // (width * columns)
    height = tl.minimum(rows - band * width, width)
    inner = pid % (width * columns)
    return band * width + inner % height, inner // height


@triton.jit
def product(
    x,
    codes,
    scales,
    zeros,
    out,
    e,
    m,
    inside,
    pid_n,
    first,
    last,
    N: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    asymmetric: tl.constexpr,
    f16: tl.constexpr,
    bm: tl.constexpr,
    bn: tl.constexpr,
    asm: tl.constexpr,
    masked: tl.constexpr,
):
    """Rows m of x, where `inside`, times the bn columns of tile pid_n of weight e, stored in those rows of out.

    Only blocks first .. last of K are multiplied: all, some or none.
    """
    groups: tl.constexpr = (K + G - 1) // G
    run: tl.constexpr = span(K, G)
    dtype: tl.constexpr = tl.float16 if f16 else tl.bfloat16
    n = pid_n * bn + tl.arange(0, bn)
    column = n
    if N % bn:
        column = tl.minimum(n, N - 1)
    r = tl.arange(0, 32)
    codes += e * stored(K, G) * N * 32
    scales += e * groups * N
    zeros += e * groups * N
    row = m.to(tl.int64) * K
    if asm:
        ask_for(scales, groups, N, pid_n * bn, bn)
        if asymmetric:
            ask_for(zeros, groups, N, pid_n * bn, bn)

    acc = tl.full((bn, bm), 0, tl.float32)
    for p in range(first, last):
        words = tl.load(codes + (p * N + column[:, None]) * 32 + r[None, :])
        four = planes(words, f16, asm)
        for j in tl.static_range(4):
            k = p * 128 + 32 * j + r
            if K % 128:
                v = tl.load(x + row[None, :] + k[:, None], mask=(k < K)[:, None] & inside[None, :], other=0)
            elif masked:
                v = tl.load(x + row[None, :] + k[:, None], mask=inside[None, :], other=0)
            else:
                v = tl.load(x + row[None, :] + k[:, None])
            g = tl.minimum((p * 128 + 32 * j // run * run) // G, groups - 1)
            place = g * N + column
            s = narrow(tl.load(scales + place).to(tl.float32), dtype, asm)
            z = magic(tl.load(zeros + place) if asymmetric else tl.full((bn,), 8, tl.int16), f16)
            acc = dot(times(minus(four[j], z[:, None], asm), s[:, None], asm), v, acc, asm)
    place = m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(out + place, narrow(acc, out.dtype.element_ty, asm), mask=(n < N)[:, None] & inside[None, :])

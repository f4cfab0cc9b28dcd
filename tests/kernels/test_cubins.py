"""Every row of the table, compiled for every architecture that it serves: what the machine code must hold."""

import pytest

pytest.importorskip("triton", reason="triton has wheels for Linux only")

from cubins import compiled

from awq_jax.kernels import target
from awq_jax.kernels.tilings import table
from awq_jax.kernels.triton import launch

pytestmark = pytest.mark.slow

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
COLUMNS = (1024, 4096, 8192, 28672)
K, N = 8192, 4096


def most(arch: int) -> int:
    """Rows of bfloat16 that the kernels take."""
    return 8 if arch < 80 else table.UNLIMITED


def cases():
    """(architecture, group, dtype, row of the table) for all that the table can be asked."""
    asked = [(row.m, n) for row in table.packaged("rule") if row.tiling.kernel != "dense" for n in COLUMNS]
    for arch in ARCHITECTURES:
        for group in (32, 128) if arch in (80, 90) else (128,):
            reached = dict.fromkeys(table.tiling(arch, "bfloat16", group, min(m, most(arch)), K, n) for m, n in asked)
            for i, t in enumerate(reached):
                yield arch, group, "float16" if group == 32 and i % 2 else "bfloat16", t
        if arch >= 80:
            yield arch, 128, "bfloat16", table.grouped_tiling(arch, "bfloat16", 128, 8, N)
        for dtype in ("bfloat16", "float16", "float32") if arch == 75 else ("float32",):
            yield arch, 64, dtype, table.tiling(arch, dtype, 64, 1, K, N)
    for case, tiling in table.timed():
        if tiling.kernel in table.TRITON:
            yield case.arch, case.group, case.dtype, tiling


def constants(t: table.Tiling, group: int) -> dict:
    return {
        **({"kb": t.kb} if t.kb else {}),
        **({} if t.kernel == "ragged" else {"layered": False}),
        **({} if t.kernel == "gemv" else {"bm": t.bm}),
        **({"splits": 1} if t.kernel == "tile" else {}),
        "M": t.bm if t.kb else 8 * t.bm,
        "N": N,
        "K": K,
        "G": group,
        "E": 1,
        "asymmetric": True,
        "bn": t.bn,
    }


@pytest.mark.parametrize(("arch", "group", "dtype", "t"), list(cases()), ids=str)
def test_machine_code(arch, group, dtype, t):
    with target(arch):
        if reason := launch.too_old(t.kernel):
            pytest.skip(reason)
    cubin = compiled(t.kernel, dtype, arch, t.warps, t.stages, **constants(t, group))
    assert cubin.stack == 0
    assert cubin.registers <= min(255, 65536 // (32 * t.warps))
    assert t.shared(arch) - 1024 <= cubin.shared <= t.shared(arch) <= table.SHARED[arch] * 1024
    loop = cubin.loops
    assert loop["I2F"] + loop["I2FP"] == 0
    weights = t.bn * 128 * (t.kb or 1) // (32 * t.warps)
    if t.kernel == "gemv":
        assert sum(loop.values()) <= 7 * weights
    else:
        assert loop["HMMA"] + loop["HGMMA"] + loop["UTCHMMA"] > 0
        assert loop["LOP3"] >= weights // 2, "one lop3 makes two weights of a thread"
        assert cubin.opcodes["CCTL"] > 0, "scales and zeros are asked for before the loop"
    assert cubin.wide_copies > 0


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("m", [1, 16, 32])
def test_three_weights_in_one_launch(arch, m):
    t = table.tiling(arch, "bfloat16", 128, m, K, 6144)
    sizes = {name: size for name, size in constants(t, 128).items() if name not in ("N", "E", "layered")}
    cubin = compiled("decode_shared", "bfloat16", arch, t.warps, t.stages, N0=4096, N1=1024, N2=1024, **sizes)
    one = compiled("decode", "bfloat16", arch, t.warps, t.stages, **constants(t, 128))
    assert (cubin.stack, cubin.shared) == (0, one.shared)
    assert cubin.wide_copies == 3 * one.wide_copies


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("m", [32, 64, 128])
def test_a_part_of_k(arch, m):
    t = table.tiling(arch, "bfloat16", 128, m, K, 8192)
    whole = constants(t, 128)
    assert t.kernel == "tile"
    part, one = (compiled("tile", "bfloat16", arch, t.warps, t.stages, **{**whole, "splits": s}) for s in (3, 1))
    assert (part.stack, part.shared, part.loops["LOP3"]) == (0, one.shared, one.loops["LOP3"])


def test_a_spill_would_be_seen():
    t = table.Tiling("tile", 128, 256, 4, 2)
    assert compiled("tile", "bfloat16", 80, t.warps, t.stages, **constants(t, 128)).stack > 0


@pytest.mark.parametrize("group", [64, 96])
@pytest.mark.parametrize("kernel", ["decode", "tile"])
def test_with_a_layer_and_odd_sizes(kernel, group):
    t = table.tiling(90, "bfloat16", group, 1 if kernel == "decode" else 1024, K, N)
    odd = {**constants(t, group), "M": t.bm - 1, "N": N - 3, "K": K - 40, "layered": True, "E": 3}
    assert compiled(kernel, "bfloat16", 90, t.warps, t.stages, **odd).stack == 0

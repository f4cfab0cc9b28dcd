"""Every format gives weights back to the bit, has its tool's bits, and says what it cannot hold."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from awq_jax.errors import InputError
from awq_jax.formats.codecs import (
    AUTOAWQ,
    CODECS,
    COMPRESSED_TENSORS,
    GPTQ,
    GPTQ_V2,
    MLX,
    Codes,
    check_fits,
    codes_of,
    encoded,
    tensor_of,
)
from awq_jax.formats.codecs.bits import codes, n_words, words
from awq_jax.formats.codecs.gemv import GEMV, GEMV_FAST, LLM_AWQ
from awq_jax.weights.spec import QuantSpec

BY_NAME = {codec.name: codec for codec in CODECS}


def codes_like(spec, k=128, n=64, seed=0, lead=()):
    """Random codes, steps and zero points of a spec."""
    rng = np.random.default_rng(seed)
    groups = k // spec.group(k)
    zero = rng.integers(0, spec.levels + 1, (*lead, groups, n), dtype=np.uint8)
    return Codes(
        rng.integers(0, spec.levels + 1, (*lead, k, n), dtype=np.uint8),
        np.exp(rng.normal(size=(*lead, groups, n)) - 5).astype(np.float16),
        np.full_like(zero, spec.middle) if spec.symmetric else zero,
        spec,
    )


def cases():
    for codec in CODECS:
        for bits in codec.holds.bits:
            for group in (32, 64, 128, -1):
                for symmetric in (False, True):
                    spec = QuantSpec(bits, group, symmetric)
                    if (symmetric or codec.holds.asymmetric) and group in (codec.holds.groups or (group,)):
                        yield pytest.param(codec, spec, id=f"{codec.name} {bits} g{group}{' sym' * symmetric}")


@pytest.mark.parametrize(("codec", "spec"), cases())
def test_a_weight_comes_back_to_the_bit(codec, spec):
    w = codes_like(spec)
    parts = encoded(codec, w)
    assert w.differs(codec.decode(parts, spec)) is None
    size = codec.size({part: a.shape for part, a in parts.items()}, spec)
    assert size == w.q.shape
    needed = codec.shapes(size, spec)
    assert {part: a.shape for part, a in parts.items()} == {part: needed[part] for part in parts}
    assert all(np.issubdtype(a.dtype, codec.parts[part]) for part, a in parts.items())
    assert {*codec.parts} - parts.keys() <= {*codec.optional, *(codec.if_asymmetric if spec.symmetric else ())}


@given(bits=st.integers(2, 8), n=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_the_bit_stream_is_that_of_a_large_number(bits, n, seed):
    q = np.random.default_rng(seed).integers(0, 2**bits, (2, n), dtype=np.uint8)
    packed = words(q, bits)
    assert packed.shape == (2, n_words(n, bits))
    for row, stream in zip(q, packed, strict=True):
        number = sum(int(code) << (bits * i) for i, code in enumerate(row))
        assert int.from_bytes(stream.astype("<i4").tobytes(), "little") == number
    np.testing.assert_array_equal(codes(packed, bits, n), q)


def shown(a):
    return [f"{word:08x}" for word in np.ascontiguousarray(a).view(np.uint32).ravel()]


def test_golden_words_of_compressed_tensors():
    """From compressed_tensors 0.19: -8 .. 7 in 4 bits, -4 .. 3 four times in 3 bits."""
    q = np.arange(16, dtype=np.uint8)[:, None]
    w = Codes(np.tile(q, (2, 1)), np.ones((1, 1), np.float16), np.full((1, 1), 8, np.uint8), QuantSpec(4, 32, True))
    assert shown(encoded(COMPRESSED_TENSORS, w)["weight_packed"])[:2] == ["76543210", "fedcba98"]
    q = np.tile(np.arange(8, dtype=np.uint8), 4)[:, None]
    w = Codes(q, np.ones((1, 1), np.float16), np.full((1, 1), 4, np.uint8), QuantSpec(3, 32, True))
    assert shown(encoded(COMPRESSED_TENSORS, w)["weight_packed"]) == ["88fac688", "c688fac6", "fac688fa"]


def test_golden_words_of_gptq_and_gemv():
    """Symmetric zero points are 0x77.. in version 1 and 0x88.. in version 2; codes lie down the inputs, in order."""
    q = np.tile(np.arange(8, dtype=np.uint8), 8)[:, None] * np.ones((1, 8), np.uint8)
    w = Codes(q, np.ones((1, 8), np.float16), np.full((1, 8), 8, np.uint8), QuantSpec(4, 64, True))
    first, second, gemv = (encoded(codec, w) for codec in (GPTQ, GPTQ_V2, GEMV))
    assert (shown(first["qzeros"]), shown(second["qzeros"])) == (["77777777"], ["88888888"])
    assert {*shown(first["qweight"])} == {*shown(gemv["qweight"])} == {"76543210"}
    assert first["g_idx"].tolist() == [0] * 64


def test_the_blocks_of_gemv_fast_are_those_of_its_closed_form():
    spec = QuantSpec(4, 64)
    w = codes_like(spec)
    packed, rows = encoded(GEMV_FAST, w)["qweight"].view(np.uint16), w.q.T
    for r, b, i, h, u, n in [(0, 0, 0, 0, 0, 0), (3, 1, 2, 1, 5, 3), (15, 1, 3, 0, 7, 2)]:
        found = packed[r, 64 * b + 16 * i + 8 * h + u] >> (4 * n) & 15
        assert found == rows[4 * r + i, 64 * b + 32 * h + 8 * n + u]


def test_zero_points_as_numbers_are_minus_zero_times_step():
    spec = QuantSpec(4, 64)
    w = codes_like(spec)
    wanted = (-(w.zero.astype(np.float32) * w.scale.astype(np.float32))).astype(np.float16)
    np.testing.assert_array_equal(encoded(MLX, w)["biases"], wanted.T)
    np.testing.assert_array_equal(encoded(LLM_AWQ, w)["scaled_zeros"][:2], wanted)
    assert encoded(LLM_AWQ, w)["scaled_zeros"].shape == (16, 64)


def test_any_zero_points_of_mlx_are_kept_and_refused_elsewhere():
    spec = QuantSpec(4, 64)
    parts = encoded(MLX, codes_like(spec))
    parts["biases"] = (parts["biases"].astype(np.float32) * 1.01 - 0.001).astype(np.float16)
    w = MLX.decode(parts, spec)
    assert w.zero.dtype == np.float32
    q = w.q.astype(np.float32).reshape(2, 64, 64)
    of_group = lambda a: np.asarray(a, np.float32).T[:, None]
    dense = q * of_group(parts["scales"]) + of_group(parts["biases"])
    np.testing.assert_allclose(w.dense(), dense.reshape(128, 64), atol=1e-7)
    np.testing.assert_allclose(tensor_of(w, np.float32).dequantize(), dense.reshape(128, 64), atol=1e-7)
    assert w.differs(MLX.decode(encoded(MLX, w), spec)) is None
    with pytest.raises(
        InputError, match="m has zero points that are no whole numbers, which AutoAWQ files cannot hold"
    ):
        encoded(AUTOAWQ, w, "m")


def test_steps_of_zero_that_give_no_zero_point_are_refused():
    parts = encoded(MLX, codes_like(QuantSpec(4, 64)))
    parts["scales"][0] = 0
    with pytest.raises(ValueError, match="steps of 0"):
        MLX.decode(parts, QuantSpec(4, 64))


@pytest.mark.parametrize("codec", [GPTQ, GPTQ_V2, COMPRESSED_TENSORS], ids=lambda codec: codec.name)
def test_rows_of_a_group_may_lie_apart(codec):
    spec = QuantSpec(4, 32, symmetric=True)
    rows = np.random.default_rng(0).permutation(np.arange(128) // 32)
    w = replace(codes_like(spec), group_of=rows)
    back = codec.decode(encoded(codec, w), spec)
    assert w.differs(back) is None
    dense = (w.q.astype(np.float32) - 8) * w.scale.astype(np.float32)[rows]
    np.testing.assert_array_equal(back.dense(), dense)
    np.testing.assert_array_equal(tensor_of(back, np.float32), dense.T)
    with pytest.raises(InputError, match="rows that lie apart"):
        encoded(AUTOAWQ, w)


@pytest.mark.parametrize("part", ["g_idx", "weight_g_idx"])
def test_a_row_of_no_group_is_refused(part):
    codec = GPTQ if part == "g_idx" else COMPRESSED_TENSORS
    spec = QuantSpec(4, 32, symmetric=True)
    parts = encoded(codec, codes_like(spec)) | {part: np.full(128, 4, np.int32)}
    with pytest.raises(ValueError, match="rows are in groups 4 to 4, there are 4"):
        codec.decode(parts, spec)


def test_what_is_declared_symmetric_is():
    w = replace(codes_like(QuantSpec(4, 64)), spec=QuantSpec(4, 64, symmetric=True))
    with pytest.raises(InputError, match="m has other zero points than the middle one"):
        encoded(COMPRESSED_TENSORS, w, "m")
    parts = AUTOAWQ.encode(w)
    assert not tensor_of(AUTOAWQ.decode(parts, w.spec), np.float16).spec.symmetric


@pytest.mark.parametrize(
    ("codec", "shape", "spec", "says"),
    [
        (GPTQ, (64, 32), QuantSpec(4, 32), "GPTQ files hold symmetric weights.*symmetric=True, or format='gptq_v2'"),
        (GPTQ, (64, 32), QuantSpec(5, 32, True), "GPTQ files hold 2, 3, 4, 8 bits, not 5: use bits=4"),
        (GPTQ_V2, (64, 12), QuantSpec(4, 32), "12 output features do not divide by 8, as GPTQ files need"),
        (MLX, (64, 32), QuantSpec(4, -1), "MLX files hold groups of 32, 64, 128, not -1: use group_size=64"),
        (MLX, (96, 32), QuantSpec(7, 32), "not 7: use bits=6"),
        (COMPRESSED_TENSORS, (96, 12), QuantSpec(3, 64), "96 input features do not divide by 64.*group_size=32"),
    ],
)
def test_what_does_not_fit_is_named_with_its_remedy(codec, shape, spec, says):
    with pytest.raises(InputError, match=f"q_proj: .*{says}.*format='orbax'"):
        check_fits(codec, "q_proj", shape, spec)


def test_all_experts_of_a_stack_are_one_array_in_mlx_alone():
    spec = QuantSpec(4, 32)
    w = codes_like(spec, lead=(3,))
    assert w.differs(MLX.decode(encoded(MLX, w), spec)) is None
    assert w.differs(replace(codes_of(tensor_of(w, np.float16)), spec=spec)) is None
    with pytest.raises(InputError, match=r"m is a stack of \(3,\) matrices, AutoAWQ files hold matrices"):
        encoded(AUTOAWQ, w, "m")


@pytest.mark.parametrize("source", [name for name in BY_NAME if BY_NAME[name].holds.asymmetric])
@pytest.mark.parametrize("target", [name for name in BY_NAME if BY_NAME[name].holds.asymmetric])
def test_any_format_becomes_any_other(source, target):
    w = codes_like(QuantSpec(4, 64))
    a, b = BY_NAME[source], BY_NAME[target]
    assert w.differs(b.decode(encoded(b, a.decode(encoded(a, w), w.spec)), w.spec)) is None

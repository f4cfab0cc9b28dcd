"""The kernels' order of codes against its definition, back again, and weights that carry it."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from awq_jax.formats.codecs import AUTOAWQ
from awq_jax.formats.quantized_writer import to_parts
from awq_jax.kernels import TILES
from awq_jax.tracing.view import View
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import dot, in_rows, in_tiles, prepare, round_to_nearest, with_input_scale


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@given(seed=st.integers(0, 2**32 - 1), planes=st.sampled_from([1, 4, 9]), lead=st.sampled_from([(), (2, 3)]))
def test_nibble_j_of_word_r_of_block_p_holds_row_128p_32j_r(seed, planes, lead):
    codes = np.random.default_rng(seed).integers(0, 16, size=(*lead, 32 * planes, 5), dtype=np.uint8)
    tiles = TILES.pack(jnp.asarray(codes), 4, 32)
    blocks = -(-planes // 4)
    assert (tiles.dtype, tiles.shape) == (np.int16, (*lead, blocks, 5 * 32))
    expected = np.zeros((*lead, blocks, 5, 32), np.uint16)
    for k in range(32 * planes):
        expected[..., k // 128, :, k % 32] |= codes[..., k, :].astype(np.uint16) << (4 * (k % 128 // 32))
    np.testing.assert_array_equal(np.asarray(tiles).view(np.uint16).reshape(expected.shape), expected)
    np.testing.assert_array_equal(TILES.unpack(tiles, 4)[..., : 32 * planes, :], codes)


SPECS = [QuantSpec(4, 32), QuantSpec(4, 64, symmetric=True), QuantSpec(4, 96), QuantSpec(4, 128), QuantSpec(4, -1)]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.group_size}{'s' if s.symmetric else ''}")
@pytest.mark.parametrize("rows", [20, 128, 200])
def test_a_weight_in_tiles_is_the_same_weight(spec, rows):
    w = with_input_scale(round_to_nearest(normal(2, rows, 6), spec), np.exp(normal(2, rows, seed=1)))
    tiles = in_tiles(w)
    assert (tiles.shape, tiles.in_features, tiles.matrix_shape) == (w.shape, rows, w.matrix_shape)
    np.testing.assert_array_equal(tiles.dequantize(), w.dequantize())
    x = normal(2, 3, rows, seed=2)
    np.testing.assert_array_equal(dot(x, tiles), dot(x, w))
    back = in_rows(tiles)
    assert jax.tree.structure(back) == jax.tree.structure(w)
    jax.tree.map(np.testing.assert_array_equal, back, w)


def test_layers_in_tiles_are_sliced_by_scan_and_batched_by_vmap():
    w, x = round_to_nearest(normal(3, 64, 64), QuantSpec(4, 32)), normal(2, 64, seed=1)
    step = lambda x, w: (jnp.tanh(dot(x, w)), None)
    np.testing.assert_array_equal(jax.lax.scan(step, x, in_tiles(w))[0], jax.lax.scan(step, x, w)[0])
    each = jax.vmap(dot, (None, 0))
    np.testing.assert_array_equal(each(x, in_tiles(w)), each(x, w))


def test_a_layout_survives():
    w = round_to_nearest(normal(64, 6), QuantSpec(4, 32))
    w = dataclasses.replace(w, layout=View.of((64, 2, 3)).layout((), (0,)))
    assert in_tiles(w).shape == (64, 2, 3)
    np.testing.assert_array_equal(in_tiles(w).dequantize(), w.dequantize())


def test_prepare_takes_the_four_bit_weights_of_a_pytree():
    params = {
        "four": round_to_nearest(normal(64, 4), QuantSpec(4, 32)),
        "three": round_to_nearest(normal(64, 4), QuantSpec(3, 32)),
        "dense": normal(4),
    }
    ready = prepare(params)
    assert (ready["four"].packing, ready["three"].packing) == ("tiles", "rows")
    assert ready["dense"] is params["dense"]
    assert jax.tree.structure(prepare(ready)) == jax.tree.structure(ready)


def test_files_do_not_know_of_tiles():
    w = round_to_nearest(normal(128, 16), QuantSpec(4, 64))
    jax.tree.map(np.testing.assert_array_equal, to_parts(AUTOAWQ, in_tiles(w), "w"), to_parts(AUTOAWQ, w, "w"))


@pytest.mark.parametrize(("dtype", "magic", "bias"), [(ml_dtypes.bfloat16, 0x4300, 128), (np.float16, 0x6400, 1024)])
def test_one_lop3_makes_two_exact_floats_of_every_word(dtype, magic, bias):
    """(a & 0x000F000F) | magic, the truth table 0xEA, over all words in both halves of a register."""
    words = np.arange(2**16, dtype=np.uint32)
    for low, high in ((words, words[::-1]), (words[::-1], words)):
        for j in range(4):
            a, b, c = (low | high << 16) >> (4 * j), np.uint32(0x000F000F), np.uint32(magic << 16 | magic)
            table = sum(1 << i for i in range(8) if (i >> 2 & i >> 1 | i) & 1)
            assert table == 0xEA
            lanes = ((a & b) | c).astype("<u4").view("<u2").view(dtype).astype(np.float64).reshape(-1, 2)
            for lane, word in zip(lanes.T, (low, high), strict=True):
                np.testing.assert_array_equal(lane, bias + (word >> (4 * j) & 15))
                for zero in (0, 8, 15):
                    difference = lane.astype(dtype) - np.asarray(bias + zero).astype(dtype)
                    np.testing.assert_array_equal(difference.astype(np.float64), (word >> (4 * j) & 15) - float(zero))

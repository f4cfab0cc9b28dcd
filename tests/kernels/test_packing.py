"""pack and unpack against numpy's own bit stream."""

import functools as ft

import hypothesis.extra.numpy as hnp
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from awq_jax.kernels import PACKINGS, TILES, pack, unpack
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import packed_as, round_to_nearest

jitted_pack = jax.jit(pack, static_argnames="bits")
jitted_unpack = jax.jit(unpack, static_argnames="bits")


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """`codes` (*lead, i, o) as little-endian words: the `bits` low bits of each code, end to end."""
    columns = np.moveaxis(codes, -1, -2)
    low_bits = np.unpackbits(columns[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(low_bits.reshape(*columns.shape[:-1], -1), axis=-1, bitorder="little")
    return np.moveaxis(packed.view("<u4"), -1, -2)


def codes(bits: int) -> st.SearchStrategy[np.ndarray]:
    shapes = st.sampled_from([(32, 1), (64, 3), (2, 96, 2)])
    return shapes.flatmap(lambda s: hnp.arrays(np.uint8, s, elements=st.integers(0, 2**bits - 1)))


@pytest.mark.parametrize("bits", range(2, 9))
@given(data=st.data())
def test_words_are_the_bit_stream_and_unpack_to_the_codes(bits, data):
    original = data.draw(codes(bits))
    words = jitted_pack(original, bits=bits)
    *lead, i, o = original.shape
    assert (words.dtype, words.shape) == (np.uint32, (*lead, i * bits // 32, o))
    np.testing.assert_array_equal(words, stream(original, bits))
    unpacked = jitted_unpack(words, bits=bits)
    assert unpacked.dtype == np.uint8
    np.testing.assert_array_equal(unpacked, original)


@given(words=hnp.arrays(np.uint32, (14, 2), elements=st.integers(0, 2**32 - 1)))
@pytest.mark.parametrize("bits", [2, 7])
def test_any_words_survive_unpack_and_pack(bits, words):
    np.testing.assert_array_equal(jitted_pack(jitted_unpack(words, bits=bits), bits=bits), words)


@pytest.mark.parametrize(
    ("bits", "first_codes", "first_words"),
    [
        (4, [0, 1, 2, 3, 4, 5, 6, 7], [0x76543210]),
        (8, [0x10, 0x32, 0x54, 0x76], [0x76543210]),
        (2, [0, 1, 2, 3], [0b11100100]),
        (3, [0] * 10 + [0b101], [0x40000000, 0b1]),
    ],
)
def test_golden_words(bits, first_codes, first_words):
    column = np.zeros((32, 1), np.uint8)
    column[: len(first_codes), 0] = first_codes
    words = np.asarray(pack(column, bits))[:, 0]
    np.testing.assert_array_equal(words[: len(first_words)], first_words)
    assert not words[len(first_words) :].any()


def test_columns_and_leading_axes_are_packed_apart():
    original = np.random.default_rng(0).integers(0, 8, size=(2, 3, 32, 4), dtype=np.uint8)
    whole = jitted_pack(original, bits=3)
    each = ft.partial(jitted_pack, bits=3)
    np.testing.assert_array_equal(whole[1, 2][:, 3:], each(original[1, 2][:, 3:]))


@pytest.mark.parametrize(("name", "bits"), [(name, bits) for name, p in PACKINGS.items() for bits in p.bits])
def test_an_entry_unpacks_what_it_packs_and_knows_its_shape(name, bits):
    packing = PACKINGS[name]
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 192, 5), np.uint8)
    stored = packing.pack(codes, bits, 96)
    assert (packing.name, stored.dtype) == (name, packing.dtype)
    back = np.asarray(packing.unpack(stored, bits))
    assert back.shape == packing.shape(stored.shape, bits)
    np.testing.assert_array_equal(back[:, :192], codes)


def test_codes_too_wide_for_a_packing_are_refused():
    w = round_to_nearest(np.ones((64, 4), np.float32), QuantSpec(3, 32))
    with pytest.raises(ValueError, match=r"has 3-bit codes, tiles holds those of \[4\]"):
        packed_as(w, TILES)

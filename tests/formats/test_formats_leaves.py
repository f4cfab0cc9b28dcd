"""QuantizedTensors from a file: whatever their leaves should be follows from the spec, and nothing else passes."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from awq_jax.formats.leaves import check_leaves
from awq_jax.formats.orbax import METADATA, load_params, save_params
from awq_jax.tracing.view import View
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import QuantizedTensor, is_quantized, round_to_nearest

SPECS = st.builds(QuantSpec, st.integers(2, 8), st.sampled_from([32, 64, 128, -1]), st.booleans())


def weight(spec, i=40, o=6, lead=(), scaled=False):
    """The leaves of a weight, counted here by hand."""
    group = -(-i // 32) * 32 if spec.group_size == -1 else spec.group_size
    rows = -(-i // group) * group
    return QuantizedTensor(
        np.zeros((*lead, rows * spec.bits // 32, o), np.uint32),
        np.ones((*lead, rows // group, o), np.float16),
        None if spec.symmetric else np.full((*lead, rows // group, o), 2**spec.bits - 1, np.uint8),
        np.ones((*lead, i), np.float32) if scaled else None,
        spec,
        np.dtype("float32"),
        rows - i,
    )


@given(spec=SPECS, i=st.integers(1, 300), o=st.integers(1, 9), lead=st.sampled_from([(), (3,)]), scaled=st.booleans())
def test_what_quantizing_makes_passes(spec, i, o, lead, scaled):
    check_leaves("w", weight(spec, i, o, lead, scaled))


@given(spec=SPECS, i=st.integers(1, 300), other=SPECS)
def test_under_another_spec_passes_only_what_could_be_a_weight_of_it(spec, i, other):
    w = replace(weight(spec, i), spec=other)
    with contextlib.suppress(ValueError):
        check_leaves("w", w)
        assert shapes(w) == shapes(weight(other, w.in_features))


def shapes(w):
    return [np.shape(leaf) for leaf in (w.codes, w.scales, w.zeros, w.input_scale)], w.pad


W = weight(QuantSpec(4, 32), 70, scaled=True)
LAYOUT = View.of((7, 10, 6)).layout((), (0, 1))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"spec": QuantSpec(4, 64)}, "padding are none of"),
        ({"spec": QuantSpec(8, 32)}, "padding are none of"),
        ({"spec": QuantSpec(4, 32, symmetric=True)}, "missing, or too many"),
        ({"pad": 0}, r"input_scale have shape \(70,\), .* ask for \(96,\)"),
        ({"pad": 58}, "with 58 rows of padding"),
        ({"pad": 26.0}, "pad 26.0"),
        ({"codes": W.codes[:-1]}, "padding are none of"),
        ({"codes": W.codes.astype(np.int32)}, "no matrix of uint32"),
        ({"scales": W.scales[:-1]}, r"scales have shape \(2, 6\), .* ask for \(3, 6\)"),
        ({"scales": None}, "scales or zeros are missing"),
        ({"scales": W.scales * np.float16(np.nan)}, "scales hold NaN"),
        ({"scales": W.zeros}, "scales are of uint8"),
        ({"zeros": None}, "scales or zeros are missing"),
        ({"zeros": W.zeros + np.uint8(1)}, "zeros go up to 16, beyond the last code, 15"),
        ({"input_scale": W.input_scale[:-1]}, r"input_scale have shape \(69,\)"),
        ({"dtype": np.dtype("int32")}, "a weight of int32"),
        ({"packing": "tiles"}, "packing 'tiles'"),
        ({"layout": replace(LAYOUT, shape=(7, 11, 6))}, "no way to read matrices"),
        ({"layout": View.of((7, 10, 6)).layout((), (0,))}, "no way to read matrices"),
        ({"layout": View.of((7, 10, 6)).layout((0,), (1,))}, "no way to read matrices"),
    ],
)
def test_leaves_that_do_not_fit(change, says):
    check_leaves("w", replace(W, layout=LAYOUT))
    with pytest.raises(ValueError, match=f"^w.*{says}"):
        check_leaves("w", replace(W, **change))


def test_a_folder_whose_group_size_was_changed_is_refused(tmp_path):
    """Read as it is, it would compute something."""
    save_params(
        tmp_path / "p",
        {"a": {"kernel": round_to_nearest(np.ones((64, 8), np.float32), QuantSpec(4, 32))}, "b": np.ones(2)},
    )
    assert is_quantized(load_params(tmp_path / "p")["a"]["kernel"])
    file = tmp_path / "p" / METADATA
    about = file.read_text()
    for old, new, says in (
        ('"group_size": 32', '"group_size": 64', r"scales have shape \(2, 8\), .* ask for \(1, 8\)"),
        ('"pad": 0', '"pad": 32', "32 rows of padding"),
        ('"bits": 4', '"bits": 2', "scales have shape|padding"),
        ("params/a/kernel", "params/b", "params/b is no quantized weight"),
    ):
        assert old in about
        file.write_text(about.replace(old, new))
        with pytest.raises(ValueError, match=f"is damaged .*{says}"):
            load_params(tmp_path / "p")

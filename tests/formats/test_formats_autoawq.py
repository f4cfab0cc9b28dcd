"""AutoAWQ's gemm layout: words, arrays, files."""

import json

import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import pytest
from folders import Source, hf_folder
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from awq_jax.errors import InputError
from awq_jax.formats.checkpoint import open_checkpoint
from awq_jax.formats.codecs import AUTOAWQ, check_fits, tensor_of
from awq_jax.formats.codecs.autoawq import pack_gemm, unpack_gemm
from awq_jax.formats.quantized_writer import Writer, to_parts
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import round_to_nearest, with_input_scale

SPEC = QuantSpec(4, 32)


def weight(k=64, n=16, seed=0):
    return np.random.default_rng(seed).normal(size=(k, n)).astype(np.float32)


def assert_same(a, b):
    """Two QuantizedTensors with equal leaves and static fields."""
    for leaf in ("codes", "scales", "zeros"):
        x, y = np.asarray(getattr(a, leaf)), np.asarray(getattr(b, leaf))
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(x, y)
    assert (a.spec, a.pad, a.shape) == (b.spec, b.pad, b.shape)


def test_golden_word():
    assert pack_gemm(np.arange(8, dtype=np.uint8)[None]).view(np.uint32).tolist() == [[0x75316420]]
    assert unpack_gemm(np.array([[0x75316420]], np.int32)).tolist() == [list(range(8))]


@given(
    codes=st.tuples(st.integers(1, 5), st.integers(1, 3)).flatmap(
        lambda s: hnp.arrays(np.uint8, (s[0], 8 * s[1]), elements=st.integers(0, 15))
    )
)
def test_codes_survive_packing(codes):
    words = pack_gemm(codes)
    assert (words.dtype, words.shape) == (np.int32, (codes.shape[0], codes.shape[1] // 8))
    np.testing.assert_array_equal(unpack_gemm(words), codes)


@given(words=hnp.arrays(np.int32, (3, 2)))
def test_any_words_survive_unpacking(words):
    np.testing.assert_array_equal(pack_gemm(unpack_gemm(words)), words)


@pytest.mark.parametrize("group_size", [32, 64, -1])
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from([(64, 24), (128, 8)]))
def test_weights_survive_to_the_bit(group_size, seed, shape):
    k, n = shape
    w = round_to_nearest(weight(k, n, seed), QuantSpec(4, group_size))
    arrays = to_parts(AUTOAWQ, w)
    groups = w.scales.shape[0]
    assert {name: (a.dtype.name, a.shape) for name, a in arrays.items()} == {
        "qweight": ("int32", (k, n // 8)),
        "qzeros": ("int32", (groups, n // 8)),
        "scales": ("float16", (groups, n)),
    }
    back = tensor_of(AUTOAWQ.decode(arrays, QuantSpec(4, group_size)), np.float32)
    assert_same(back, w)
    np.testing.assert_array_equal(back.dequantize(), w.dequantize())


def test_a_symmetric_weight_stores_its_zero_point():
    w = round_to_nearest(weight(), QuantSpec(4, 32, symmetric=True))
    arrays = to_parts(AUTOAWQ, w)
    assert set(arrays["qzeros"].view(np.uint32).ravel().tolist()) == {0x88888888}
    back = tensor_of(AUTOAWQ.decode(arrays, SPEC), np.float32)
    np.testing.assert_array_equal(back.dequantize(), w.dequantize())


@pytest.mark.parametrize(
    ("shape", "spec", "says"),
    [
        ((64, 16), QuantSpec(3, 32), "not 3: use bits=4"),
        ((96, 16), QuantSpec(4, 64), "use group_size=32"),
        ((576, 16), QuantSpec(4, 128), "use group_size=64"),
        ((100, 16), QuantSpec(4, 64), "group size, as AutoAWQ files need: leave the site dense"),
        ((64, 12), QuantSpec(4, 64), "12 output features do not divide by 8"),
        ((40, 16), QuantSpec(4, -1), "40 input features"),
    ],
)
def test_what_does_not_fit_is_named_with_its_remedy(shape, spec, says):
    with pytest.raises(InputError, match=f"q_proj: .*{says}.*format='orbax'"):
        check_fits(AUTOAWQ, "q_proj", shape, spec)
    with pytest.raises(InputError, match=says):
        to_parts(AUTOAWQ, round_to_nearest(weight(*shape), spec))


def test_what_fits_passes():
    check_fits(AUTOAWQ, "q_proj", (576, 8), QuantSpec(4, 64))
    check_fits(AUTOAWQ, "q_proj", (96, 8), QuantSpec(4, -1))


def test_an_input_scale_must_be_folded_first():
    with pytest.raises(InputError, match="scales='folded'"):
        to_parts(AUTOAWQ, with_input_scale(round_to_nearest(weight(), SPEC), np.ones(64, np.float32)))


def test_steps_are_held_against_those_of_their_column():
    small = weight() * np.where(np.arange(16) == 3, 1e-9, 1).astype(np.float32)
    with pytest.raises(InputError, match=r"its steps: values of at most .*e-10 are too small for float16"):
        to_parts(AUTOAWQ, round_to_nearest(small, SPEC))
    part = weight() * np.where(np.arange(64) < 32, 1e-9, 1).astype(np.float32)[:, None]
    assert to_parts(AUTOAWQ, round_to_nearest(part, SPEC))["scales"].max() > 0.1


def test_quantization_config_is_what_loaders_ask_for():
    said = AUTOAWQ.about({}, ["model.layers.0.mlp.up_proj", "lm_head"], QuantSpec(4, 64, symmetric=True))
    assert said["quantization_config"] == {
        "quant_method": "awq",
        "zero_point": True,
        "group_size": 64,
        "bits": 4,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.up_proj"],
    }


def written(folder, parts, config=None, companions=()):
    folder.mkdir(exist_ok=True)
    source = Source({"model_type": "llama", "dtype": "bfloat16", **(config or {})}, tuple(companions))
    writer = Writer(AUTOAWQ, folder, source, SPEC)
    for part, tensors in parts.items():
        writer.write(part, tensors)
    writer.finish()
    return folder


def test_a_written_model_reads_back_to_the_bit(tmp_path):
    generation = tmp_path / "generation_config.json"
    generation.write_text("{}")
    embedding = weight(16, 32).astype(ml_dtypes.bfloat16)
    q, dense = round_to_nearest(weight(), SPEC), weight(16, 64, 1)
    parts = {
        "outer": {"model.embed_tokens.weight": embedding, "model.norm.weight": np.ones(4, np.float32)},
        "layers_0": {
            "model.layers.0.self_attn.q_proj.weight": q,
            "model.layers.0.self_attn.q_proj.bias": np.ones(16, np.float32),
            "model.layers.0.mlp.up_proj.weight": dense,
        },
    }
    folder = written(tmp_path / "out", parts, companions=[generation])
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp.up_proj"]
    stored = load_file(folder / "model.safetensors")
    assert {a.dtype.name for a in stored.values()} == {"int32", "float16"}

    checkpoint = open_checkpoint(folder)
    assert checkpoint.kind == "awq"
    assert checkpoint.names == {name for tensors in parts.values() for name in tensors}
    assert checkpoint.shape("model.layers.0.self_attn.q_proj.weight") == (64, 16)
    assert checkpoint.nbytes == sum(a.nbytes for a in stored.values())
    assert_same(checkpoint.read("model.layers.0.self_attn.q_proj.weight"), q)
    for name, expected in (("embed_tokens", embedding), ("layers.0.mlp.up_proj", dense)):
        np.testing.assert_array_equal(checkpoint.read(f"model.{name}.weight"), expected.astype(np.float16))
    assert checkpoint.companions == [folder / "generation_config.json"]


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("a.weight", np.full((2, 2), 7e4, np.float32), "part: a.weight: a value of 70000 does not fit float16"),
        ("a.weight", np.array([[1e5]], ml_dtypes.bfloat16), "does not fit float16"),
        ("a.weight", np.array([[np.nan]], np.float32), "a value of nan"),
        ("a.weight", np.full((2, 2), 1e-9, np.float32), "part: a.weight: values of at most 1e-09 are too small"),
        ("a.weight", round_to_nearest(weight(128), QuantSpec(4, 64)), r"is \(4, 64\) and \(4, 32\) elsewhere"),
        ("lm_head.weight", round_to_nearest(weight(), SPEC), "dense lm_head"),
        (
            "a.weight",
            with_input_scale(round_to_nearest(weight(), SPEC), np.ones(64)),
            "part: a.weight has an input scale",
        ),
    ],
)
def test_what_a_file_cannot_hold_is_named(tmp_path, name, tensor, says):
    with pytest.raises(InputError, match=says):
        Writer(AUTOAWQ, tmp_path, Source({}), SPEC).write("part", {name: tensor})


def raw_folder(folder, arrays, **quantization):
    found = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", **quantization}
    tensors = {f"m.{name}": a for name, a in arrays.items()}
    return hf_folder(folder, {"model.safetensors": tensors}, {"quantization_config": found})


def test_a_folder_of_an_old_autoawq_is_read(tmp_path):
    w = round_to_nearest(weight(), SPEC)
    hf_folder(tmp_path, {"model.safetensors": {f"m.{n}": a for n, a in to_parts(AUTOAWQ, w).items()}})
    old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(old))
    assert_same(open_checkpoint(tmp_path).read("m.weight"), w)


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"version": "marlin"}, "layout 'marlin'"),
        ({"bits": 8}, "in 8 bits"),
        ({"quant_method": "hqq"}, "by hqq in 4 bits"),
        ({"group_size": 48}, "group_size=48"),
        ({"group_size": 64}, r"group_size=64, which needs qzeros \(1, 2\) and scales \(1, 16\)"),
    ],
)
def test_a_folder_quantized_otherwise_is_refused(tmp_path, quantization, says):
    raw_folder(tmp_path, to_parts(AUTOAWQ, round_to_nearest(weight(), SPEC)), **quantization)
    with pytest.raises(InputError, match=says):
        open_checkpoint(tmp_path)


def test_a_weight_without_its_scales_is_named(tmp_path):
    arrays = to_parts(AUTOAWQ, round_to_nearest(weight(), SPEC))
    del arrays["scales"]
    raw_folder(tmp_path, arrays)
    with pytest.raises(InputError, match=r"m\.qweight but no m\.scales"):
        open_checkpoint(tmp_path)

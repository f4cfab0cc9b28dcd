"""Folders that other tools quantized are named as what they are; AutoAWQ's are read in all the words that it has."""

import numpy as np
import pytest
from folders import hf_folder

from awq_jax.errors import InputError
from awq_jax.formats.checkpoint import open_checkpoint
from awq_jax.formats.codecs import AUTOAWQ
from awq_jax.formats.quantized_writer import to_parts
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import round_to_nearest

CT = {"weights": {"num_bits": 4, "group_size": 64}, "input_activations": {"num_bits": 8}, "targets": ["Linear"]}
FOREIGN = {
    "compressed-tensors in 4 bits and layout 'quantized activations'": {
        "quantization_config": {"config_groups": {"group_0": CT}}
    },
    "compressed-tensors in 4, 8 bits and layout 'float-quantized'": {
        "compression_config": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": CT | {"input_activations": None}, "group_1": {"weights": {"num_bits": 8}}},
        }
    },
    "gptq in 5 bits": {"quantization_config": {"quant_method": "gptq", "bits": 5}},
    "gptq in 4 bits and layout 'marlin'": {"quantization_config": {"bits": 4, "desc_act": False, "format": "marlin"}},
    "auto-round in 4 bits and layout 'x'": {
        "quantization_config": {"quant_method": "auto-round", "bits": 4, "packing_format": "x"}
    },
    "MLX in 4 bits and layout 'mxfp4'": {
        "quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "quantization_config": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    },
    "bitsandbytes in 4 bits": {"quantization_config": {"load_in_4bit": True, "load_in_8bit": False}},
    "torchao": {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4"}}}},
    "ModelOpt": {"quantization_config": {"quant_algo": "FP8"}},
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "hqq in 2 bits": {
        "quantization_config": {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 2}}}
    },
    "awq in 3 bits": {"quantization_config": {"quant_method": "awq", "bits": 3}},
    "awq in 4 bits and layout 'marlin'": {"quantization_config": {"w_bit": 4, "version": "Marlin"}},
    "awq and layout 'gemm', 'gemv'": {
        "quantization_config": {"quant_method": "AWQ", "version": "gemm", "format": "gemv"}
    },
    "a tool that is not known by its fields ['a', 'b']": {"quantization_config": {"b": 1, "a": 2}},
}


@pytest.mark.parametrize("tool", FOREIGN)
def test_a_foreign_quantization_is_named(tmp_path, tool):
    hf_folder(tmp_path, {"model.safetensors": {"w": np.zeros(2, np.float32)}}, FOREIGN[tool])
    with pytest.raises(InputError) as e:
        open_checkpoint(tmp_path)
    assert f"is quantized already, by {tool}: of quantized models only" in str(e.value)
    assert "Start from the dense model" in str(e.value)


@pytest.mark.parametrize(
    ("file", "content", "tool"),
    [
        (
            "quantize_config.json",
            '{"bits": 4, "desc_act": true, "format": "marlin"}',
            "gptq in 4 bits and layout 'marlin'",
        ),
        (
            "hf_quant_config.json",
            '{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}',
            "ModelOpt",
        ),
    ],
)
def test_a_file_beside_config_json_names_it_too(tmp_path, file, content, tool):
    hf_folder(tmp_path, {"model.safetensors": {"w": np.zeros(2, np.float32)}})
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=f"is quantized already, by {tool}: "):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("nothing", [None, {}])
def test_nothing_is_no_quantization(tmp_path, nothing):
    hf_folder(tmp_path, {"model.safetensors": {"w": np.zeros(2, np.float32)}}, {"quantization_config": nothing})
    assert open_checkpoint(tmp_path).kind == "huggingface"


W = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float16)
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def awq_folder(folder, symmetric=False, dropped=(), arrays=None, **quantization):
    """(path, the weight that it holds) of an AutoAWQ folder of one linear."""
    w = round_to_nearest(W, QuantSpec(4, 32, symmetric=symmetric))
    stored = {f"m.{name}": a for name, a in (to_parts(AUTOAWQ, w) | (arrays or {})).items() if name not in dropped}
    found = {name: value for name, value in (AWQ | quantization).items() if value != "absent"}
    return hf_folder(folder, {"model.safetensors": stored}, {"quantization_config": found}), w


@pytest.mark.parametrize(
    "quantization",
    [
        {"bits": "absent", "group_size": "absent", "w_bit": 4, "q_group_size": 32, "version": "GEMM"},
        {"quant_method": "absent", "bits": "absent", "group_size": "absent", "w_bit": 4, "q_group_size": 32},
        {"version": "absent", "zero_point": "absent", "bits": "absent"},
        {"backend": "auto", "checkpoint_format": "gemm", "format": "gemm", "modules_to_not_convert": None},
        {"dynamic": {"-:lm_head": {}}, "extra_config": {"lm_head": {"bits": 16}}},
        {"dynamic": None, "quant_method": "AWQ"},
    ],
)
def test_all_words_for_autoawq_are_read(tmp_path, quantization):
    folder, w = awq_folder(tmp_path, **quantization)
    found = open_checkpoint(folder).read("m.weight")
    assert found.spec == w.spec
    np.testing.assert_array_equal(found.dequantize(), w.dequantize())


@pytest.mark.parametrize("dropped", [("qzeros",), ()])
def test_a_zero_point_that_there_is_not_is_8(tmp_path, dropped):
    folder, w = awq_folder(tmp_path, symmetric=True, dropped=dropped, zero_point=False)
    found = open_checkpoint(folder).read("m.weight")
    assert found.spec.symmetric
    np.testing.assert_array_equal(found.dequantize(), w.dequantize())


def test_zero_points_that_are_missing_are_named(tmp_path):
    folder, _ = awq_folder(tmp_path, symmetric=True, dropped=("qzeros",))
    with pytest.raises(InputError, match=r"m\.qweight but no m\.qzeros: download it again"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"bits": "4"}, "'s bits='4': expected a whole number"),
        ({"bits": None}, "'s bits=None: expected a whole number"),
        ({"bits": True}, "'s bits=True: expected a whole number"),
        ({"bits": 0}, "by awq in 0 bits"),
        ({"group_size": 0}, "group_size=0: use a multiple of 32"),
        ({"group_size": -2}, "group_size=-2: use a multiple of 32"),
        ({"group_size": 32.0}, "'s group_size=32.0: expected a whole number"),
        ({"group_size": [32]}, r"'s group_size=\[32\]: expected a whole number"),
        ({"group_size": 2**80}, "do not fit config.json's group_size=1208925819614629174706176"),
        ({"zero_point": "yes"}, "'s zero_point='yes': expected true or false"),
        ({"version": 2}, "by awq in 4 bits and layout '2'"),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, r"has dynamic with settings of its own for '\+:\.\*down\.\*'"),
        ({"dynamic": {".*up.*": {"group_size": 64}}}, "has dynamic with settings of its own for "),
        ({"dynamic": 3}, "has dynamic with settings of its own for '3'"),
        ({"extra_config": {"m": {"bits": 8}}}, "has extra_config with settings of its own for 'm'"),
    ],
)
def test_a_field_that_cannot_be_is_named(tmp_path, quantization, says):
    folder, _ = awq_folder(tmp_path, **quantization)
    with pytest.raises(InputError, match=says):
        open_checkpoint(folder)


@pytest.mark.parametrize("found", [4, "awq", [], True])
def test_a_quantization_that_is_no_object_is_refused(tmp_path, found):
    hf_folder(tmp_path, {"model.safetensors": {"w": np.zeros(2, np.float32)}}, {"quantization_config": found})
    with pytest.raises(InputError, match=r"its quantization_config is .*: expected an object"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "array", "says"),
    [
        ("qweight", np.zeros((64, 2), np.float32), "m cannot be read .qweight is float32, not int32"),
        ("qzeros", np.zeros((2, 2), np.uint32), "m cannot be read .qzeros is uint32, not int32"),
        ("scales", np.zeros((2, 16), np.int32), "m cannot be read .scales are int32, not floating point"),
        ("qweight", np.zeros((64,), np.int32), r"m: qweight \(64,\), .* do not fit"),
        ("qweight", np.zeros((0, 2), np.int32), r"m: qweight \(0, 2\), .* do not fit"),
        ("qzeros", np.zeros((2, 2, 1), np.int32), "do not fit"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path, name, array, says):
    folder, _ = awq_folder(tmp_path, arrays={name: array})
    with pytest.raises(InputError, match=says):
        open_checkpoint(folder).read("m.weight")

"""Files that we write, read by a reader in torch that was written from the format's description alone."""

import numpy as np
import pytest
import torch
from folders import Source
from safetensors.torch import load_file
from transformers import AutoConfig

from awq_jax.formats.checkpoint import open_checkpoint
from awq_jax.formats.codecs import AUTOAWQ
from awq_jax.formats.quantized_writer import Writer
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import round_to_nearest

NIBBLE_OF_COLUMN = [0, 4, 1, 5, 2, 6, 3, 7]


def columns(words):
    """int32 [r, c] -> the 8 * c codes of each row, one nibble at a time."""
    out = torch.empty(words.shape[0], 8 * words.shape[1], dtype=torch.int64)
    for column, nibble in enumerate(NIBBLE_OF_COLUMN):
        out[:, column::8] = (words.long() >> 4 * nibble) & 15
    return out


def dense(tensors, module):
    """float32 [in, out], (q - z) * s row by row of the groups."""
    q, z, s = columns(tensors[f"{module}.qweight"]), columns(tensors[f"{module}.qzeros"]), tensors[f"{module}.scales"]
    rows = q.shape[0] // s.shape[0]
    groups = [(q[g * rows : (g + 1) * rows] - z[g]).float() * s[g].float() for g in range(s.shape[0])]
    return torch.cat(groups)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_an_independent_reader_finds_the_same_weights_to_the_bit(tmp_path, group_size, symmetric):
    spec = QuantSpec(4, group_size, symmetric)
    rng = np.random.default_rng(0)
    weights = {
        f"model.layers.{i}.up_proj": rng.normal(size=(256, 8 * n)).astype(np.float32) for i, n in ((0, 3), (1, 9))
    }
    quantized = {name: round_to_nearest(w, spec) for name, w in weights.items()}
    writer = Writer(AUTOAWQ, tmp_path, Source({"model_type": "llama"}), spec)
    writer.write("outer", {"model.norm.weight": np.ones(4, np.float32)})
    writer.write("layers", {f"{name}.weight": w for name, w in quantized.items()})
    writer.finish()
    tensors = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.int32, torch.float16}
    checkpoint = open_checkpoint(tmp_path)
    for name, w in quantized.items():
        found = dense(tensors, name).numpy()
        np.testing.assert_array_equal(found, w.dequantize())
        read = checkpoint.read(f"{name}.weight")
        assert read.dtype == np.float16
        np.testing.assert_array_equal(read.dequantize(), found.astype(np.float16))


def test_transformers_understands_the_config(tmp_path):
    writer = Writer(AUTOAWQ, tmp_path, Source({"model_type": "llama", "dtype": "bfloat16"}), QuantSpec(4, 64))
    writer.write("outer", {"model.norm.weight": np.ones(4, np.float32)})
    writer.finish()
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.dtype == torch.float16
    found = config.quantization_config
    assert (found["quant_method"], found["version"], found["bits"], found["group_size"]) == ("awq", "gemm", 4, 64)

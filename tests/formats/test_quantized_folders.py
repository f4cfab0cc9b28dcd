"""What is written in every format is what its servers ask for; what other tools wrote runs as it did there."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from quantized import rounded_folder
from server_rules import refusals

import awq_jax as awq
from awq_jax import QuantSpec
from awq_jax.formats.checkpoint import open_checkpoint

SAMPLES = Path(__file__).parents[3] / "shared" / "samples"
SPEC, SYMMETRIC = QuantSpec(4, 32), QuantSpec(4, 32, symmetric=True)
DENSE = {"layers.0.mlp.down_proj": None, **{f"layers.1.mlp.{part}_proj": None for part in ("gate", "up")}}


@pytest.mark.parametrize(
    ("format", "spec"),
    [
        ("awq", SPEC),
        ("awq", SYMMETRIC),
        ("gptq", SYMMETRIC),
        ("gptq_v2", SPEC),
        ("compressed-tensors", SPEC),
        ("compressed-tensors", SYMMETRIC),
        ("compressed-tensors", QuantSpec(8, -1, symmetric=True)),
    ],
    ids=str,
)
def test_servers_take_what_is_written(tmp_path, format, spec):
    folder = rounded_folder(tmp_path, format, spec, others=DENSE)
    assert refusals(folder) == []
    found = {name: tensor.spec for name, tensor in open_checkpoint(folder).tensors.items() if tensor.spec}
    assert {(one.bits, one.group_size) for one in found.values()} == {(spec.bits, spec.group_size)}
    assert found.keys() == {
        f"model.layers.{i}.{name}.weight"
        for i in (0, 1)
        for name in (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
        if f"layers.{i}.{name}" not in DENSE
    }


def test_the_rules_tell_what_is_wrong(tmp_path):
    folder = rounded_folder(tmp_path, "awq", SPEC, others={"layers.0.mlp.up_proj": None})
    assert refusals(folder) == [
        "only some of ('gate_proj', 'up_proj') of model.layers.0.mlp are quantized",
    ]
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"modules_to_not_convert": ["self_attn.q_proj"], "group_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    told = " ".join(refusals(folder))
    assert "model.layers.0.mlp.up_proj is dense, which config.json does not say" in told
    assert "model.layers.1.self_attn.q_proj is quantized, but skipped" in told
    assert "'scales': [2, 64]}, not {'qweight': [64, 8], 'qzeros': [1, 8]" in told


def test_widths_that_differ_are_declared_and_read(tmp_path):
    others = {"layers.0.mlp.down_proj": QuantSpec(8, 64), "layers.1.mlp.up_proj": QuantSpec(3, 32)}
    for format in ("compressed-tensors", "mlx", "gptq_v2"):
        checkpoint = open_checkpoint(rounded_folder(tmp_path, format, SPEC, others=others))
        specs = {name: checkpoint.tensors[f"model.{name}.weight"].spec for name in (*others, "layers.0.mlp.up_proj")}
        assert specs == {**others, "layers.0.mlp.up_proj": SPEC}


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the samples of other tools beside the repository")
@pytest.mark.parametrize("sample", sorted(path.name for path in SAMPLES.glob("tiny-*")))
def test_what_others_wrote_gives_the_logits_that_they_expect(sample):
    expected = np.load(SAMPLES / sample / "expected.npz")
    tokens = np.atleast_2d(expected["tokens"])
    logits = np.asarray(awq.load(SAMPLES / sample).logits(jnp.asarray(tokens)))
    wanted = expected["logits"].reshape(logits.shape)
    assert (logits.argmax(-1) == wanted.argmax(-1)).all()
    # mlx-lm computed its own in float16.
    np.testing.assert_allclose(logits, wanted, atol=0.1 if "mlx" in sample else 5e-5)

"""Models that no decoder of ours computes, on disk: quantized, loaded, refused."""

import json

import jax
import numpy as np
import pytest
import torch
from hf_families import folder

import awq_jax as awq
from awq_jax.errors import InputError
from awq_jax.formats.checkpoint import open_checkpoint
from awq_jax.pipeline.bridged_parts import joined, matrix
from awq_jax.torch_bridge.places import Place
from awq_jax.tracing.view import View
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import round_to_nearest

NEAREST = awq.Recipe(group_size=32, **{k: getattr(awq.PRESETS["rtn"], k) for k in ("scale", "clip", "rounding")})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "sample"),
    [
        ("gpt_neo", {}, "h.0.mlp.c_fc.weight"),
        ("minimax", {"num_hidden_layers": 1, "layer_types": ["full_attention"]}, "experts.3.w1.weight"),
    ],
)
def test_quantized_and_loaded(name, changes, sample, tmp_path):
    """Under the names of the file; the dense folder gives torch's logits, the quantized one is near."""
    source, model = folder(tmp_path / "dense", name, **changes)
    told = []
    options = {"calib": None, "samples": 1, "seq_len": 32, "told": told.append}
    awq.quantize_checkpoint(source, tmp_path / "out", NEAREST, **options)
    assert f"Computed by transformers' {type(model).__name__}, traced." in told
    found = open_checkpoint(tmp_path / "out").tensors
    assert set(found) == set(open_checkpoint(source).tensors)
    assert all(t.quantized for name, t in found.items() if name.endswith(sample))
    tokens = np.arange(40)[None]
    with torch.no_grad():
        want = model.eval()(torch.tensor(tokens)).logits.numpy()
    apart = lambda path: np.linalg.norm(awq.load(path).logits(tokens) - want) / np.linalg.norm(want)
    assert apart(source) < 1e-5
    quantized = awq.load(tmp_path / "out")
    assert apart(tmp_path / "out") < 0.2
    assert quantized.generate("The sky", max_new_tokens=2, chat=False) is not None


def test_parts_of_a_weight_make_it_again():
    """Experts (e, 2 o, i) of one matmul, of which the file has gate and up of each."""
    spec, shape = QuantSpec(4, 32), (3, 16, 64)
    w = jax.random.normal(jax.random.key(0), shape)
    whole = round_to_nearest(w.swapaxes(1, 2), spec)
    layout = View.of(shape).layout([0], [2])
    whole = jax.tree_util.tree_unflatten(jax.tree.structure(whole), jax.tree.leaves(whole))
    whole = type(whole)(whole.codes, whole.scales, whole.zeros, None, spec, whole.dtype, layout=layout)
    places = [Place(f"{e}.{part}", (8, 64), (e * 16 + 8 * part) * 64, (64, 1)) for e in range(3) for part in (0, 1)]
    parts = {place.name: matrix(whole, place) for place in places}
    np.testing.assert_array_equal(parts["2.1"].dequantize(), whole.dequantize()[2, 8:].T)
    again = joined(places, shape, parts.__getitem__, transposed=False)
    np.testing.assert_array_equal(again.dequantize(), whole.dequantize())
    assert again.layout == layout


def test_what_neither_computes_is_refused(tmp_path):
    source, _ = folder(tmp_path / "m", "gpt_neo")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["Ours"]}))
    with pytest.raises(InputError, match=r"architectures=\['Ours'\]: no model here computes that"):
        awq.load(source)


def test_models_that_read_more_than_tokens_are_refused(tmp_path):
    source, _ = folder(tmp_path / "m", "t5", num_layers=1)
    with pytest.raises(InputError, match=r"T5ForConditionalGeneration reads more than tokens.*awq.from_torch"):
        awq.load(source)


def test_tensors_that_nothing_reads_are_named(tmp_path):
    from safetensors.numpy import load_file, save_file

    source, _ = folder(tmp_path / "m", "gpt_neo")
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"transformer.h.0.lora_A": np.ones((2, 2), np.float32)}, source / "model.safetensors")
    with pytest.raises(
        InputError, match=r"reads nothing of 1 \(transformer.h.0.lora_A\): a LoRA adapter is not merged"
    ):
        awq.load(source)


def test_what_only_our_decoders_do_is_refused_before_any_work(tmp_path):
    source, _ = folder(tmp_path / "m", "gpt_neo")
    for option in ({"format": "orbax"}, {"average_bits": 4.5, "format": "orbax"}, {"distill": 1}):
        with pytest.raises(InputError, match="not for models that transformers' code computes"):
            awq.quantize_checkpoint(source, tmp_path / "out", NEAREST, **option)
    with pytest.raises(InputError, match=r"calib='self'.*give"):
        awq.quantize_checkpoint(source, tmp_path / "out", NEAREST, calib="self", seq_len=32)
    assert not (tmp_path / "out").exists()

"""What a checkpoint holds against what is computed: nothing unread, nothing missing, told before any work."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import config, tensors, tiny_folder

import awq_jax as awq
from awq_jax.errors import InputError
from awq_jax.formats.checkpoint import Checkpoint, open_checkpoint
from awq_jax.formats.stored import StoredTensor
from awq_jax.models.families.llama import LLAMA
from awq_jax.pipeline.agreement import check_params
from awq_jax.pipeline.load import architecture
from awq_jax.weights.spec import QuantSpec

LAYER = "model.layers.0."


@pytest.fixture(scope="module")
def weights():
    return tensors(config())


def opened(weights, **changes):
    """A checkpoint of these arrays."""
    stored = {
        name: StoredTensor(w.shape, w.nbytes, lambda w=w: w, stored_as=w.dtype.name) for name, w in weights.items()
    }
    return Checkpoint("huggingface", Path("m"), config(**changes), stored, lambda: pytest.fail("read"), 0)


def renamed(prefix):
    return lambda weights: {prefix + name: w for name, w in weights.items()}


def more(*names, shape=(64,)):
    return lambda weights: weights | {name: np.zeros(shape, np.float32) for name in names}


def without(name):
    return lambda weights: {n: w for n, w in weights.items() if n != name}


BIASES = [f"{LAYER}self_attn.{x}_proj.bias" for x in "qkvo"]

DISAGREEING = {
    "an untied head": (
        lambda w: w,
        {"tie_word_embeddings": True},
        r"1 \(lm_head.weight\): .*tie_word_embeddings to false",
    ),
    "biases": (
        more(*BIASES),
        {},
        r"nothing reads 4 \(model.layers.0.self_attn.q_proj.bias, .*: set attention_bias .* true",
    ),
    "a bias of the mlp": (more(f"{LAYER}mlp.up_proj.bias"), {}, "nothing reads 1 .*mlp_bias .* true"),
    "norms of q and k": (more(f"{LAYER}self_attn.q_norm.weight"), {}, "nothing reads 1 .*another architecture"),
    "fewer layers": (lambda w: w, {"num_hidden_layers": 1}, "counts 1 layers .*, the weights have 2"),
    "more layers": (lambda w: w, {"num_hidden_layers": 3}, "counts 3 layers .*, the weights have 2"),
    "far more layers": (
        lambda w: w,
        {"num_hidden_layers": 16_777_216},
        "num_hidden_layers=16777216: expected a whole number from 1 to 10000",
    ),
    "torch.compile": (renamed("_orig_mod."), {}, "has no tensor model.embed_tokens.weight .* from within a wrapper"),
    "PEFT": (renamed("base_model.model."), {}, "near it: base_model.model.model.embed_tokens.weight.* save_pretrained"),
    "data parallel": (renamed("module."), {}, "from within a wrapper"),
    "LoRA": (more(f"{LAYER}mlp.up_proj.lora_A.weight"), {}, "adapter is not merged: .*merge_and_unload"),
    "scales": (more(f"{LAYER}mlp.up_proj.weight_scale"), {}, "quantized in a way that config.json does not say"),
    "codes": (
        lambda w: w | {f"{LAYER}mlp.up_proj.weight": np.ones((128, 64), np.int8)},
        {},
        "up_proj.weight is of int8, which are the codes of a quantization",
    ),
    "anything": (more("vision.weight"), {}, r"has 22 tensors, of which nothing reads 1 \(vision.weight\): .*another"),
    "no head": (without("lm_head.weight"), {}, "no tensor lm_head.weight .*set tie_word_embeddings to true"),
    "no biases": (
        lambda w: w,
        {"attention_bias": True},
        "no tensor model.layers.0.* set attention_bias and mlp_bias to false",
    ),
    "a vocabulary": (lambda w: w, {"vocab_size": 16_777_216}, r"embed_tokens.weight has shape \(320, 64\), the config"),
    "a width": (lambda w: w, {"hidden_size": 1_048_576}, "has shape .* the config asks for"),
    "heads": (lambda w: w, {"head_dim": 65_536}, "has shape .* the config asks for"),
}


@pytest.mark.parametrize("case", DISAGREEING)
def test_what_does_not_agree_is_told_with_its_cause_and_remedy(weights, case):
    change, changes, says = DISAGREEING[case]
    start = time.monotonic()
    with pytest.raises(InputError, match=says):
        architecture(opened(change(weights), **changes))
    assert time.monotonic() - start < 10


def test_what_is_computed_anew_may_be_there(weights):
    architecture(opened(more(f"{LAYER}self_attn.rotary_emb.inv_freq")(weights)))


def test_a_head_that_is_the_embedding_may_be_there(weights):
    embedding = weights["model.embed_tokens.weight"]
    architecture(opened(weights | {"lm_head.weight": embedding.copy()}, tie_word_embeddings=True))
    other = embedding.copy()
    other[-1, -1] += 1e-6
    with pytest.raises(InputError, match="this one has other values"):
        architecture(opened(weights | {"lm_head.weight": other}, tie_word_embeddings=True))


def test_quantized_matrices_may_stand_beside_dense_ones(weights):
    """Even where servers would make one matrix of both."""
    checkpoint = opened(weights)
    name = f"{LAYER}self_attn.k_proj.weight"
    mixed = {**checkpoint.tensors, name: StoredTensor((64, 32), 0, lambda: None, spec=QuantSpec())}
    architecture(Checkpoint("autoawq", Path("m"), checkpoint.config, mixed, checkpoint.load_tokenizer, 0))


def test_params_of_our_own_folders_too(weights):
    hf = LLAMA.config(config())
    params = LLAMA.load(weights.__getitem__, hf)
    check_params(Path("m"), params, hf)
    for damage, says in (
        (lambda p: p["layers_0"]["attn"].pop("o"), "no tensor layers_0/attn/o/kernel"),
        (lambda p: p["layers_0"]["attn"]["q"].update(bias=np.zeros(64)), r"nothing reads 1 \(layers_0/attn/q/bias\)"),
        (lambda p: p["norm"].update(scale=np.zeros(65)), r"norm/scale has shape \(65,\), the config asks for \(64,\)"),
        (lambda p: p.pop("layers_1"), "counts 2 layers .*, the weights have 1"),
    ):
        broken = LLAMA.load(weights.__getitem__, hf)
        damage(broken)
        with pytest.raises(InputError, match=says):
            check_params(Path("m"), broken, hf)


def test_every_command_says_so(tmp_path):
    """One check at one place: what reads a model passes through it."""
    model = tiny_folder(
        tmp_path / "in", tie_word_embeddings=True, weights={"lm_head.weight": np.zeros((320, 64), "f4")}
    )
    for use in (awq.load, lambda path: awq.quantize_checkpoint(path, tmp_path / "out")):
        with pytest.raises(
            InputError, match=re.escape(f"{model} has 21 tensors, of which nothing reads 1 (lm_head.weight)")
        ):
            use(model)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_the_weights(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(config()))
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=rf"holds a PEFT adapter \({name}\), .*merge_and_unload"):
        open_checkpoint(tmp_path)

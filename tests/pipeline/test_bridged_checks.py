"""What a model of transformers' code is held against before any work, and where it takes the place of our decoder."""

import json
import shutil

import numpy as np
import pytest
from checkpoints import config, tiny_folder
from hf_families import folder
from safetensors.numpy import load_file, save_file

import awq_jax as awq
from awq_jax.clock import Clock
from awq_jax.errors import InputError
from awq_jax.formats.checkpoint import open_checkpoint
from awq_jax.pipeline import quantize_bridged as module
from awq_jax.pipeline.bridged import bridged, fallback
from awq_jax.pipeline.fused import fused_by_name
from awq_jax.torch_bridge.pretrained import Pretrained, reads

QKV = [f"transformer.h.0.attn.attention.{part}_proj.weight" for part in "qkv"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    one = {"num_layers": 1, "num_hidden_layers": 1, "attention_types": [[["global"], 1]]}
    return folder(tmp_path_factory.mktemp("bridged") / "m", "gpt_neo", **one)[0]


@pytest.fixture(scope="module")
def found(source):
    return fallback(open_checkpoint(source))


@pytest.fixture
def planned(found, tmp_path, monkeypatch):
    """`(recipe, formats) -> (the recipe that streams, what was told)`, without text or search."""
    recipes, read = [], []
    monkeypatch.setattr(module, "text_for", lambda *_, **__: read.append(1) or (np.zeros((1, 8), np.int32), ()))

    def streamed(fn, params, batches, recipe, *_, **__):
        recipes.append(recipe)
        raise InterruptedError

    monkeypatch.setattr(module, "stream", streamed)

    def plan(recipe, *formats):
        told = []
        options = {"calib": (), "seq_len": 8, "feed": "dense", "overwrite": False, "inputs": (), "clock": Clock()}
        options |= {"progress": lambda *_: None, "told": told.append}
        try:
            module.quantize_bridged(found, tmp_path / "out", recipe, formats or ("awq",), **options)
        except InterruptedError:
            return recipes[-1], told
        finally:
            assert bool(read) == bool(recipes)  # Refused before any text is read.
        raise AssertionError

    return plan


def test_without_a_group_size_the_largest_that_fits_is_taken(planned):
    recipe, told = planned(awq.Recipe(samples=1))
    assert recipe.group_size == 32
    assert "Groups of 32: the largest of 128, 64, 32 that divides 64, 96." in told


@pytest.mark.parametrize(
    ("rules", "error"),
    [
        ((awq.Rule("no such site", skip=True),), "rule 'no such site' matches none of the 6 sites"),
        ((awq.Rule("", skip=True),), "leave every matrix dense"),
        (
            (awq.Rule("c_fc", group_size=64),),
            "c_fc.weight: a rule gives it 4 bits in groups of 64, but an AutoAWQ file",
        ),
        ((awq.Rule("q_proj", group_size=64),), "q_proj.*, .*k_proj.*: rules give them different bits"),
    ],
)
def test_rules_are_checked_before_any_text_is_read(planned, rules, error):
    recipe = awq.Recipe(samples=1, group_size=32, rules=rules)
    with pytest.raises(ValueError, match=error):
        planned(recipe, "compressed-tensors" if "different" in error else "awq")


def test_no_length_is_refused_as_for_our_decoders(found, tmp_path):
    with pytest.raises(InputError, match="seq_len=0: give 1 or more of each"):
        awq.quantize_checkpoint(found.checkpoint.path, tmp_path / "out", awq.Recipe(samples=1), seq_len=0)


def test_what_servers_join_is_skipped_together(planned):
    recipe, _ = planned(awq.Recipe(samples=1, group_size=32, rules=(awq.Rule("q_proj", skip=True),)))
    assert [recipe.spec_of(name) for name in QKV] == [None] * 3
    assert recipe.spec_of(QKV[0].replace("q_proj", "out_proj"))


def test_matrices_that_lie_the_other_way_round_are_refused(planned, monkeypatch):
    monkeypatch.setattr(Pretrained, "is_transposed", lambda self, name: "c_fc" in name)
    with pytest.raises(InputError, match=r"those of GPTNeoForCausalLM are stored the other way round \(Conv1D\)"):
        planned(awq.Recipe(samples=1))


def test_wholes_are_known_by_the_names_of_their_parts():
    files = {f"m.0.attn.{part}_proj.weight": [f"0.attn.{part}_proj.weight"] for part in "qkvo"}
    files |= {
        f"m.0.mlp.experts.{name}": [f"0.moe.experts.{e}.{w}.weight" for e in (0, 1) for w in ws]
        for name, ws in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",)))
    }
    files |= {f"m.0.ffn.{name}_proj.weight": [f"0.ffn.{name}_proj.weight"] for name in ("gate", "up", "down")}
    names = list(files)
    assert fused_by_name(files) == {
        "0.attn.qkv_proj": names[:3],
        "0.moe.experts": names[4:6],
        "0.ffn.gate_up_proj": names[6:8],
    }


@pytest.fixture
def copied(source, tmp_path):
    """A copy of the folder with other tensors: `copied({"name": f(tensors)})`."""

    def make(change):
        shutil.copytree(source, tmp_path / "m")
        tensors = load_file(tmp_path / "m/model.safetensors")
        save_file(tensors | change(tensors), tmp_path / "m/model.safetensors", {"format": "pt"})
        return open_checkpoint(tmp_path / "m")

    return make


def test_a_tied_head_may_be_stored_with_the_same_values(copied):
    same = copied(lambda tensors: {"lm_head.weight": tensors["transformer.wte.weight"].copy()})
    assert bridged(same).left_over() == ["lm_head.weight"]


def test_a_tied_head_of_other_values_is_refused(copied):
    other = copied(lambda tensors: {"lm_head.weight": tensors["transformer.wte.weight"] + 1})
    with pytest.raises(InputError, match=r"lm_head.weight has other values than transformer.wte.weight.*set tie_word"):
        bridged(other)


def test_integers_in_place_of_weights_are_refused(copied):
    codes = copied(lambda tensors: {"transformer.h.0.mlp.c_fc.weight": np.ones((96, 64), np.int8)})
    with pytest.raises(InputError, match=r"c_fc.weight is of int8, which are the codes of a quantization"):
        bridged(codes)


def test_what_our_decoder_does_not_compute_and_transformers_does_is_bridged(tmp_path):
    source, _ = folder(tmp_path / "m", "opt", num_hidden_layers=1, do_layer_norm_before=False)
    found = fallback(open_checkpoint(source))
    assert str(found) == (
        "the config has do_layer_norm_before=False, which this model does not compute. Computed by transformers' "
        "OPTForCausalLM, traced"
    )


def test_a_field_that_neither_computes_is_refused_beside_one_that_transformers_does(tmp_path):
    source, _ = folder(tmp_path / "m", "opt", num_hidden_layers=1, do_layer_norm_before=False)
    hf = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(hf | {"attention_sinks": 4}))
    with pytest.raises(InputError, match=r"attention_sinks=4, which this model does not compute"):
        fallback(open_checkpoint(source))


def test_more_layers_than_tensors_are_refused_at_once(source, tmp_path):
    shutil.copytree(source, tmp_path / "m")
    hf = json.loads((source / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(hf | {"num_hidden_layers": 10**9}))
    with pytest.raises(InputError, match="has num_hidden_layers=1000000000, and the tensors are of 1 layers"):
        bridged(open_checkpoint(tmp_path / "m"))


def test_what_neither_computes_is_refused_in_the_words_of_both(tmp_path):
    source = tiny_folder(tmp_path / "m")
    (source / "config.json").write_text(json.dumps(config(hidden_act="nothing")))
    with pytest.raises(InputError, match=r"hidden_act='nothing': .* only, and transformers' code is no way out: .*Key"):
        fallback(open_checkpoint(source))


def test_what_transformers_does_not_look_at_either_is_no_matter_of_the_bridge():
    """Its DeepSeek-V2 takes a softmax whatever scoring_func says."""
    assert not reads({"architectures": ["DeepseekV2ForCausalLM"]}, "scoring_func")
    assert reads({"architectures": ["DeepseekV2ForCausalLM"]}, "topk_method")

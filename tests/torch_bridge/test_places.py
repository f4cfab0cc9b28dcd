import numpy as np
import pytest
import torch
import transformers
from hf_families import FAMILIES
from safetensors.numpy import load_file

from awq_jax.errors import InputError
from awq_jax.torch_bridge.places import assembled, places


def model(name, **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **FAMILIES[name][1] | changes)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "qwen3_moe"])
def test_params_are_put_together_from_what_transformers_saves(name, tmp_path):
    found = model(name)
    found.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    params = {n: p.detach().numpy() for n, p in found.named_parameters()}
    where = places(found, params, {n: w.shape for n, w in stored.items()})
    for n, p in params.items():
        np.testing.assert_array_equal(assembled(where[n], p.shape, stored.__getitem__), p)
    assert {place.name for parts in where.values() for place in parts} == set(stored)


def test_the_prefix_of_the_base_model_may_be_missing():
    """gpt2's own checkpoint has "h.0...." for transformer.h.0."""
    found = model("gpt2", n_layer=1)
    params = dict(found.named_parameters())
    stored = {n.removeprefix("transformer."): p.shape for n, p in params.items()}
    assert places(found, params, stored)["transformer.wte.weight"][0].name == "wte.weight"


def test_what_the_file_lacks_is_named():
    found = model("qwen3_moe", num_hidden_layers=1)
    params = dict(found.named_parameters())
    with pytest.raises(InputError, match=r"experts.0.gate_proj.weight is not there.*Qwen3MoeForCausalLM takes"):
        places(found, params, {n: p.shape for n, p in params.items()})

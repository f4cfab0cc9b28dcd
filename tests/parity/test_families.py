"""Every family against transformers' code of it on torch: logits at once, and with a cache in 16 steps."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_models
from flax.traverse_util import unflatten_dict
from quick import quick_compilation
from torch_models import LENGTH, logits, made, tokens

import awq_jax as awq
from awq_jax.formats.checkpoint import open_checkpoint
from awq_jax.models import for_config
from awq_jax.models.decoder import Decoder, hidden, init_cache
from awq_jax.models.families import FAMILIES
from awq_jax.models.family import param_shapes
from awq_jax.pipeline.load import architecture
from awq_jax.transforms.folding import check_folds

PROMPT = LENGTH - 16
ROPE = {"rope_theta": 10000.0}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.5, 2.0, 3.0, 4.0]}
LONGROPE = ROPE | LONG | {"rope_type": "longrope", "original_max_position_embeddings": 32}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5}
MULTIPLIERS = {
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
}
LLAMAS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
GPT = dict.fromkeys((*LLAMAS, "max_position_embeddings"), ...)
GPT |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ALL_HEADS = {"num_key_value_heads": ...}
LATENT = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "kv_lora_rank": 10, "n_routed_experts": 6}
LATENT |= {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
LATENT |= {"num_key_value_heads": 4, "n_shared_experts": 2}
MSCALE = YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}

CASES = {
    "Llama": {},
    "Llama: yarn": {"rope_parameters": YARN},
    "Llama: dynamic": {
        "rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 4.0},
        "max_position_embeddings": 32,
    },
    "Mistral": {"sliding_window": 5},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "Granite": MULTIPLIERS,
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "Arcee": {},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen3": {"head_dim": 16},
    "Qwen2Moe": MOE | {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 2},
    "Qwen3Moe": MOE | {"head_dim": 16, "mlp_only_layers": [0], "norm_topk_prob": True},
    "Gemma": {"head_dim": 16},
    "Gemma2": GEMMA,
    "Gemma3": GEMMA | {"sliding_window_pattern": 2},
    "Phi": {},
    "Phi3": {"sliding_window": 6},
    "Phi3: longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    "Olmo": {"clip_qkv": 0.5},
    "Olmo2": {},
    "Olmo3": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "Olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "GPT2LMHeadModel": GPT | {"scale_attn_by_inverse_layer_idx": True},
    "GPTJ": GPT | {"rotary_dim": 4},
    "GPTNeoX": ALL_HEADS,
    "GPTNeoX: one after the other": ALL_HEADS | {"use_parallel_residual": False},
    "OPT": ALL_HEADS | {"intermediate_size": ..., "ffn_dim": 48, "word_embed_proj_dim": 32},
    "Starcoder2": {"sliding_window": 7},
    "StableLm": {"use_qkv_bias": True},
    "StableLm: parallel": {"use_parallel_residual": True},
    "Cohere": {},
    "Cohere2": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "Glm": {"head_dim": 16, "pad_token_id": 0},
    "Glm4": {"head_dim": 16, "pad_token_id": 0},
    "Nemotron": {},
    "Exaone4": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "Helium": {"head_dim": 8, "attention_bias": True},
    "Ernie4_5": {"head_dim": 8, "use_bias": True},
    "SeedOss": {"head_dim": 16},
    "DeepseekV2": LATENT | {"q_lora_rank": None, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"},
    "DeepseekV3": LATENT | {"q_lora_rank": 12, "n_group": 2, "topk_group": 1, "rope_parameters": MSCALE},
}
"""What of a config differs from the small one, by architecture."""


def name_of(case: str) -> str:
    name = case.partition(":")[0]
    return name if name.endswith("Model") else f"{name}ForCausalLM"


def test_every_family_is_among_the_cases():
    assert {name for family in FAMILIES for name in family.architectures} == set(map(name_of, CASES))


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compilation():
        yield


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, tmp_path):
    expected = logits(made(name_of(case), tmp_path, CASES[case]))
    assert expected.std() > 0.01
    near = ft.partial(np.testing.assert_allclose, rtol=0, atol=1e-4 * np.abs(expected).max())
    checkpoint = open_checkpoint(tmp_path)
    family, config = architecture(checkpoint)
    params = checkpoint.params(family, config)
    run = jax.jit(ft.partial(Decoder(config).apply, {"params": params}))
    near(run(tokens()), expected)
    found, cache = run(tokens()[:, :PROMPT], cache=init_cache(config, 2, LENGTH))
    found = [found]
    for k in range(PROMPT, LENGTH):
        more, cache = run(tokens()[:, k : k + 1], cache=cache, position=jnp.asarray(k))
        found.append(more)
    near(np.concatenate(found, 1), expected)


COUNTS = {
    "Arcee": (6, 3),
    "Phi": (6, 2),
    "Phi3": (4, 4),
    "Olmo": (7, 1),
    **dict.fromkeys(("Olmo2", "Olmo3", "Exaone4"), (7, 2)),
    **dict.fromkeys(("Mixtral", "Qwen3Moe", "Olmoe"), (8, 4)),
    "Qwen2Moe": (12, 5),
    "GPT2LMHeadModel": (4, 3),
    "GPTNeoX": (4, 3),
    "GPTJ": (6, 2),
    "OPT": (6, 4),
    **dict.fromkeys(("Starcoder2", "Nemotron"), (6, 3)),
    **dict.fromkeys(("Cohere", "Cohere2"), (7, 3)),
    **dict.fromkeys(("Glm", "Glm4"), (6, 4)),
    "DeepseekV2": (11, 6),
    "DeepseekV3": (12, 7),
}
"""Sites and folds of the last layer; (7, 4), those of a Llama, where a family is not here."""


def traced(case):
    """Sites and folds, the function and the shapes of its params."""
    hf = torch_models.config(name_of(case), CASES[case]).to_dict() | {"architectures": [name_of(case)]}
    config = for_config(hf).config(hf)
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in param_shapes(config).items()}
    fn, params = ft.partial(hidden, config), unflatten_dict(shapes, sep="/")
    return awq.sites(fn, params, jnp.asarray(tokens())), fn, params


@pytest.mark.parametrize("case", [case for case in CASES if ":" not in case])
def test_the_sites_and_folds_of_a_layer(case):
    found, _, _ = traced(case)
    last = lambda name: name.startswith("layers_1/")
    folds = [fold for fold in found.folds if last(fold.sites[0])]
    assert (sum(map(last, found.sites)), len(folds)) == COUNTS.get(case, (7, 4))


@pytest.mark.parametrize("case", ["Phi3", "Qwen2Moe", "GPTNeoX", "Cohere", "DeepseekV3"])
def test_folding_keeps_the_function(case):
    found, fn, shapes = traced(case)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape) / 4, w.dtype), shapes)
    check_folds(fn, params, found.folds, jnp.asarray(tokens()))

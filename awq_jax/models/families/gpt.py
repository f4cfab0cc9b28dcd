"""GPT-2, GPT-J, GPT-NeoX (Pythia), OPT and StarCoder2: layer norms, MLPs without a gate, biases."""

from typing import Any

from awq_jax.models.families.common import (
    QKVO,
    Config,
    Found,
    act,
    biases,
    ignored,
    layer_norm,
    llama_like,
    refuse,
    whole,
)
from awq_jax.models.family import Family
from awq_jax.models.fields import Spelled, flag
from awq_jax.models.rope import Rope

UP_DOWN = frozenset({"up", "down"})
GPT2_SPELLING = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
}


def gpt(hf: Found, *, act_key: str = "activation_function", **same: Any) -> Config:
    """An MLP without a gate, 4 times as wide as the model where the file does not say."""
    mlp_width = whole(hf, "intermediate_size", None) or 4 * whole(hf, "hidden_size")
    return llama_like(hf, gated=False, mlp_width=mlp_width, act=act(hf, "gelu_new", act_key), **same)


def gpt2(hf: Found) -> Config:
    hf = Spelled(hf, **GPT2_SPELLING)
    ignored(hf, "reorder_and_upcast_attn")  # The same numbers.
    head_dim = whole(hf, "hidden_size") // whole(hf, "num_attention_heads")
    scale = head_dim**-0.5 if flag(hf, "scale_attn_weights", True) else 1.0
    smaller = flag(hf, "scale_attn_by_inverse_layer_idx", False)
    return gpt(
        hf,
        norm=layer_norm(hf, "layer_norm_epsilon"),
        rope=None,
        fused_qkv="together",
        biases=UP_DOWN | {"qkv", "o"},
        each=lambda i: {"attention_scale": scale / (i + 1) if smaller else scale},
        tied=True,
        outer={"learned": whole(hf, "max_position_embeddings", 1024)},
    )


def gptj(hf: Found) -> Config:
    hf = Spelled(hf, **GPT2_SPELLING)
    refuse(hf, "rotary", but=True)
    rope = Rope(whole(hf, "rotary_dim", 64), interleaved=True)
    norm = layer_norm(hf, "layer_norm_epsilon")
    return gpt(hf, norm=norm, rope=rope, order="parallel", biases=UP_DOWN, outer={"head_bias": True})


def gpt_neox(hf: Found) -> Config:
    hf = Spelled(hf, rope_theta="rotary_emb_base", partial_rotary_factor="rotary_pct")
    return gpt(
        hf,
        act_key="hidden_act",
        norm=layer_norm(hf),
        rotated=0.25,
        fused_qkv="by head",
        biases=UP_DOWN | biases(hf, attention=True, of_attention=frozenset({"qkv", "o"})),
        order="parallel of two norms" if flag(hf, "use_parallel_residual", True) else "pre",
    )


def opt(hf: Found) -> Config:
    hf = Spelled(hf, intermediate_size="ffn_dim")
    width, positions = whole(hf, "hidden_size"), whole(hf, "max_position_embeddings", 2048)
    for key, only in (("do_layer_norm_before", True), ("layer_norm_elementwise_affine", True)):
        refuse(hf, key, but=only)
    refuse(hf, "word_embed_proj_dim", but=width)
    refuse(hf, "_remove_final_layer_norm")
    return gpt(
        hf,
        norm=layer_norm(hf, "no field: always 1e-5"),
        rope=None,
        biases=UP_DOWN | QKVO if flag(hf, "enable_bias", True) else frozenset(),
        tied=True,
        # The first two rows are for padding.
        outer={"learned": positions + 2, "learned_from": 2},
    )


def starcoder2(hf: Found) -> Config:
    refuse(hf, "norm_type", but="layer_norm")
    return gpt(
        hf,
        act_key="hidden_act",
        norm=layer_norm(hf, "norm_epsilon"),
        biases=UP_DOWN | QKVO if flag(hf, "use_bias", True) else frozenset(),
        window=whole(hf, "sliding_window", None),
        tied=True,
    )


GPT2 = Family(
    ("GPT2LMHeadModel",),
    gpt2,
    {
        "embed": "transformer.wte",
        "embed/positions": "transformer.wpe.weight",
        "norm": "transformer.ln_f",
        "attn_norm": "ln_1",
        "mlp_norm": "ln_2",
        "attn/qkv": "attn.c_attn",
        "attn/o": "attn.c_proj",
        "mlp/up": "mlp.c_fc",
        "mlp/down": "mlp.c_proj",
    },
    layers="transformer.h.{i}.",
    ignored=r"\.attn\.(bias|masked_bias)$",
    in_out=True,
)
GPTJ = Family(
    ("GPTJForCausalLM",),
    gptj,
    {
        "embed": "transformer.wte",
        "norm": "transformer.ln_f",
        "attn_norm": "ln_1",
        **{f"attn/{part}": f"attn.{part}_proj" for part in "qkv"},
        "attn/o": "attn.out_proj",
        "mlp/up": "mlp.fc_in",
        "mlp/down": "mlp.fc_out",
    },
    layers="transformer.h.{i}.",
    ignored=r"\.attn\.(bias|masked_bias|embed_positions)$",
)
GPT_NEOX = Family(
    ("GPTNeoXForCausalLM",),
    gpt_neox,
    {
        "embed": "gpt_neox.embed_in",
        "norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
        "attn/qkv": "attention.query_key_value",
        "attn/o": "attention.dense",
        "mlp/up": "mlp.dense_h_to_4h",
        "mlp/down": "mlp.dense_4h_to_h",
    },
    layers="gpt_neox.layers.{i}.",
    ignored=r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",
)
OPT = Family(
    ("OPTForCausalLM",),
    opt,
    {
        "embed": "model.decoder.embed_tokens",
        "embed/positions": "model.decoder.embed_positions.weight",
        "norm": "model.decoder.final_layer_norm",
        "attn_norm": "self_attn_layer_norm",
        "mlp_norm": "final_layer_norm",
        "attn/o": "self_attn.out_proj",
        "mlp/up": "fc1",
        "mlp/down": "fc2",
    },
    layers="model.decoder.layers.{i}.",
)
STARCODER2 = Family(("Starcoder2ForCausalLM",), starcoder2, {"mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"})
FAMILIES = (GPT2, GPTJ, GPT_NEOX, OPT, STARCODER2)

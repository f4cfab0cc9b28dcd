"""Llama (1 to 3, SmolLM2, TinyLlama, Yi), and those that differ from it in little."""

from awq_jax.models.families.common import Config, Found, act, biases, ignored, llama_like, refuse, whole, windows
from awq_jax.models.family import Family
from awq_jax.models.fields import flag, listed, real
from awq_jax.models.layer import Experts


def mistral(hf: Found) -> Config:
    # transformers gives one whose config names no window one of 4096.
    return llama_like(hf, window=whole(hf, "sliding_window", None) if "sliding_window" in hf else 4096)


def mixtral(hf: Found) -> Config:
    refuse(hf, "router_jitter_noise", but=0.0)
    experts = Experts(
        whole(hf, "num_local_experts", 8), whole(hf, "num_experts_per_tok", 2), whole(hf, "intermediate_size")
    )
    return llama_like(hf, experts=experts, window=whole(hf, "sliding_window", None), theta=1e6, eps=1e-5)


def granite(hf: Found) -> Config:
    multiplier = lambda key: real(hf, key, 1.0)
    outer = {"embed_scale": multiplier("embedding_multiplier"), "logit_scale": 1 / multiplier("logits_scaling")}
    scale, residual = multiplier("attention_multiplier"), multiplier("residual_multiplier")
    return llama_like(hf, biases=biases(hf), attention_scale=scale, residual=residual, outer=outer)


def smollm3(hf: Found) -> Config:
    every = whole(hf, "no_rope_layer_interval", 4)
    ignored(hf, "max_window_layers")
    turns = listed(hf, "no_rope_layers", whole(hf, "num_hidden_layers"), (0, 1))
    turned = lambda i: turns[i] if turns else (i + 1) % every
    sliding = flag(hf, "use_sliding_window", False)
    window = windows(hf, lambda i: sliding and hf.get("sliding_window") is not None and not turned(i))
    each = lambda i: window(i) | ({} if turned(i) else {"rope": None})
    return llama_like(hf, biases=biases(hf), theta=2e6, tied=True, each=each)


LLAMA = Family(("LlamaForCausalLM",), lambda hf: llama_like(hf, biases=biases(hf)))
MISTRAL = Family(("MistralForCausalLM",), mistral)
MIXTRAL = Family(
    ("MixtralForCausalLM",),
    mixtral,
    {
        "mlp/router": "block_sparse_moe.gate",
        "mlp/experts/gate": "block_sparse_moe.experts.{e}.w1",
        "mlp/experts/up": "block_sparse_moe.experts.{e}.w3",
        "mlp/experts/down": "block_sparse_moe.experts.{e}.w2",
    },
)
GRANITE = Family(("GraniteForCausalLM",), granite)
SMOLLM3 = Family(("SmolLM3ForCausalLM",), smollm3)
ARCEE = Family(
    ("ArceeForCausalLM",), lambda hf: llama_like(hf, biases=biases(hf), gated=False, act=act(hf, "relu2"), eps=1e-5)
)
FAMILIES = (LLAMA, MISTRAL, MIXTRAL, GRANITE, SMOLLM3, ARCEE)

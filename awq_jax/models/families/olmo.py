"""OLMo 1 to 3 and OLMoE; from 2 on norms stand after attention and MLP, and q and k have one over all heads."""

from typing import Any

from awq_jax.models.families.common import Config, Found, biases, flag, llama_like, slides, whole, windows
from awq_jax.models.family import Family
from awq_jax.models.fields import real
from awq_jax.models.layer import Experts, Norm
from awq_jax.models.rope_fields import ropes_by_kind


def olmo(hf: Found) -> Config:
    norm = Norm(1e-5, centred=True, scaled=False)
    return llama_like(hf, norm=norm, biases=biases(hf), clip_qkv=real(hf, "clip_qkv", None))


def olmo2(hf: Found, **more: Any) -> Config:
    return llama_like(hf, order="post", qk_norm="all", biases=biases(hf), eps=1e-5, **more)


def olmo3(hf: Found) -> Config:
    local = slides(hf, lambda i: (i + 1) % 4 != 0)
    sees = windows(hf, local.__getitem__, 4096)
    thetas = dict.fromkeys(("full_attention", "sliding_attention"), ("rope_theta", 5e5))
    head_dim = whole(hf, "head_dim", None) or whole(hf, "hidden_size") // whole(hf, "num_attention_heads")
    ropes = ropes_by_kind(hf, head_dim, thetas)
    each = lambda i: sees(i) | {"rope": ropes["sliding_attention" if local[i] else "full_attention"]}
    return olmo2(hf, rope=None, each=each)


def olmoe(hf: Found) -> Config:
    n = whole(hf, "num_local_experts", None) or whole(hf, "num_experts", 64)
    top, width = whole(hf, "num_experts_per_tok", 8), whole(hf, "intermediate_size")
    experts = Experts(n, top, width, flag(hf, "norm_topk_prob", False))
    return llama_like(
        hf, qk_norm="all", biases=biases(hf), eps=1e-5, experts=experts, clip_qkv=real(hf, "clip_qkv", None)
    )


OLMO = Family(("OlmoForCausalLM",), olmo)
OLMO2 = Family(("Olmo2ForCausalLM",), olmo2)
OLMO3 = Family(("Olmo3ForCausalLM",), olmo3)
OLMOE = Family(("OlmoeForCausalLM",), olmoe)
FAMILIES = (OLMO, OLMO2, OLMO3, OLMOE)

"""DeepSeek V2 and V3: latent attention, experts beside a shared one after some dense layers."""

from typing import Any

from awq_jax.models.families.common import Config, Found, biases, flag, ignored, llama_like, mapping, refuse, whole
from awq_jax.models.family import Family
from awq_jax.models.fields import real, word
from awq_jax.models.layer import Experts, Latent
from awq_jax.models.rope_fields import rope_of, sharper

LATER = r"|model\.layers\.61\."
"""V3's layer for several tokens at once, which transformers does not read either."""


def deepseek(
    hf: Found, experts: dict[str, Any], *, n: int, width: int, shared: int, first: int, interleaved: bool
) -> Config:
    """What V2 and V3 share.

    Args:
      experts: how they are chosen.
      n, width, shared, first: experts, their width, how many of that width are shared, and the first layer that has
        them, where the file does not say.
    """
    refuse(hf, "moe_layer_freq", but=1)
    still, turned = whole(hf, "qk_nope_head_dim", 128), whole(hf, "qk_rope_head_dim", 64)
    ignored(hf, "head_dim", "qk_head_dim")  # What follows from these two.
    scaling = mapping(hf, "rope_scaling") or mapping(hf, "rope_parameters")
    stretched = sharper(real(scaling, "factor", 1.0), real(scaling, "mscale_all_dim", None) or 0.0)
    width = whole(hf, "moe_intermediate_size", width)
    chosen = Experts(
        whole(hf, "n_routed_experts", n),
        whole(hf, "num_experts_per_tok"),
        width,
        shared=width * whole(hf, "n_shared_experts", shared),
        scale=real(hf, "routed_scaling_factor", experts.pop("scale")),
        **experts,
    )
    dense = hf.get("first_k_dense_replace", first) or 0
    return llama_like(
        hf,
        kv_heads=whole(hf, "num_attention_heads"),
        head_dim=still + turned,
        latent=Latent(
            whole(hf, "q_lora_rank", None if "q_lora_rank" in hf else 1536),
            whole(hf, "kv_lora_rank", 512),
            whole(hf, "v_head_dim", 128),
        ),
        rope=rope_of(hf, turned, interleaved=interleaved),
        attention_scale=(still + turned) ** -0.5 * stretched**2,
        biases=biases(hf, of_attention=frozenset({"a", "o"})),
        each=lambda i: {"experts": chosen if i >= dense else None},
    )


def deepseek_v2(hf: Found) -> Config:
    refuse(hf, "norm_topk_prob")
    refuse(hf, "scoring_func", but="softmax")
    grouped = word(hf, "topk_method", ("greedy", "group_limited_greedy"), "greedy") != "greedy"
    groups, top_groups = (whole(hf, name, None) or 1 for name in ("n_group", "topk_group"))
    how = {"groups": groups, "top_groups": top_groups} if grouped else {}
    experts = {"renormalised": False, "scale": 1.0} | how
    return deepseek(hf, experts, n=64, width=1407, shared=2, first=0, interleaved=True)


def deepseek_v3(hf: Found) -> Config:
    refuse(hf, "topk_method", but="noaux_tc")
    refuse(hf, "scoring_func", but="sigmoid")
    experts = {
        "renormalised": flag(hf, "norm_topk_prob", True),
        "groups": whole(hf, "n_group", 8),
        "top_groups": whole(hf, "topk_group", 4),
        "best": 2,
        "sigmoid": True,
        "corrected": True,
        "scale": 2.5,
    }
    interleaved = flag(hf, "rope_interleave", True)
    return deepseek(hf, experts, n=256, width=2048, shared=1, first=3, interleaved=interleaved)


DEEPSEEK_V2 = Family(("DeepseekV2ForCausalLM",), deepseek_v2)
DEEPSEEK_V3 = Family(("DeepseekV3ForCausalLM",), deepseek_v3, ignored=Family.ignored + LATER)
FAMILIES = (DEEPSEEK_V2, DEEPSEEK_V3)

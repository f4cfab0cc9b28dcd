"""Qwen 2 and 3, dense and of experts."""

from collections.abc import Callable
from typing import Any

from awq_jax.models.families.common import QKV, Config, Found, biases, ignored, llama_like, whole, windows
from awq_jax.models.family import Family
from awq_jax.models.fields import flag
from awq_jax.models.layer import Experts


def window(hf: Found) -> Callable[[int], dict[str, Any]]:
    """Layers from max_window_layers on see a window, if use_sliding_window says so."""
    if not flag(hf, "use_sliding_window", False):
        ignored(hf, "sliding_window", "max_window_layers", "layer_types")
        return lambda i: {"window": None}
    first = whole(hf, "max_window_layers", 28)
    return windows(hf, lambda i: i >= first, 4096)


def sparse(hf: Found, n: int, top: int, width: int, **more: Any) -> Callable[[int], dict[str, Any]]:
    """Layers of experts and those without; `n` of `width`, of which `top` are chosen, where the file does not say."""
    experts = Experts(
        whole(hf, "num_local_experts", None) or whole(hf, "num_experts", n),
        whole(hf, "num_experts_per_tok", top),
        whole(hf, "moe_intermediate_size", width),
        flag(hf, "norm_topk_prob", False),
        **more,
    )
    step, dense = whole(hf, "decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ValueError(f"the config has mlp_only_layers={dense!r}: expected a list.")
    return lambda i: {"experts": experts if i not in dense and (i + 1) % step == 0 else None}


def qwen2(hf: Found) -> Config:
    return llama_like(hf, biases=QKV, each=window(hf))


def qwen3(hf: Found) -> Config:
    return llama_like(hf, biases=biases(hf), qk_norm="head", usual_head_dim=128, each=window(hf))


def qwen2_moe(hf: Found) -> Config:
    shared = whole(hf, "shared_expert_intermediate_size", 5632)
    experts, sees = sparse(hf, 60, 4, 1408, shared=shared, shared_gate=True), window(hf)
    has_biases = QKV if flag(hf, "qkv_bias", True) else frozenset()
    return llama_like(hf, biases=has_biases, each=lambda i: experts(i) | sees(i))


def qwen3_moe(hf: Found) -> Config:
    experts, used = sparse(hf, 128, 8, 768), flag(hf, "use_sliding_window", False)
    window = whole(hf, "sliding_window", 4096) if used else ignored(hf, "sliding_window", "max_window_layers")
    return llama_like(hf, biases=biases(hf), qk_norm="head", window=window, each=experts)


QWEN2 = Family(("Qwen2ForCausalLM",), qwen2)
QWEN3 = Family(("Qwen3ForCausalLM",), qwen3)
QWEN2_MOE = Family(
    ("Qwen2MoeForCausalLM",),
    qwen2_moe,
    {f"mlp/shared/{part}": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")}
    | {"mlp/shared_gate": "mlp.shared_expert_gate"},
)
QWEN3_MOE = Family(("Qwen3MoeForCausalLM",), qwen3_moe)
FAMILIES = (QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE)

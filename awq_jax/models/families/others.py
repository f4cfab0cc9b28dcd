"""StableLM, Cohere (Command R), GLM, Nemotron, EXAONE, Helium, ERNIE, Seed-OSS: a twist each."""

from typing import Any

from awq_jax.models.families.common import (
    MLP,
    QKV,
    QKVO,
    Config,
    Found,
    act,
    biases,
    layer_norm,
    llama_like,
    refuse,
    slides,
    whole,
    windows,
)
from awq_jax.models.family import Family
from awq_jax.models.fields import flag, real
from awq_jax.models.layer import Norm

AFTER = {"attn_post_norm": "post_self_attn_layernorm", "mlp_post_norm": "post_mlp_layernorm"}
"""GLM-4's norms after attention and MLP."""


def stablelm(hf: Found) -> Config:
    refuse(hf, "qk_layernorm")
    refuse(hf, "rotary_scaling_factor", but=1)
    order = "parallel" if flag(hf, "use_parallel_residual", False) else "pre"
    has_biases = QKV if flag(hf, "use_qkv_bias", False) else frozenset()
    return llama_like(hf, norm=layer_norm(hf), order=order, biases=has_biases, rotated=0.25)


def cohere(hf: Found, **more: Any) -> Config:
    refuse(hf, "use_qk_norm")
    outer, norm = {"logit_scale": real(hf, "logit_scale", 0.0625)}, layer_norm(hf, bias=False)
    same: dict[str, Any] = {"norm": norm, "order": "parallel", "interleaved": True, "tied": True, "theta": 5e5}
    same |= more
    return llama_like(hf, outer=outer, biases=biases(hf), **same)


def cohere2(hf: Found) -> Config:
    """Only layers with a window are told positions."""
    every = whole(hf, "sliding_window_pattern", 4)
    local = slides(hf, lambda i: (i + 1) % every != 0)
    sees = windows(hf, local.__getitem__, 4096)
    return cohere(hf, theta=1e4, each=lambda i: sees(i) | ({} if local[i] else {"rope": None}))


def glm(hf: Found, **more: Any) -> Config:
    same: dict[str, Any] = {
        "rotated": 0.5,
        "interleaved": True,
        "eps": 1.5625e-7,
        "usual_head_dim": 128,
        "fused_mlp": True,
    }
    return llama_like(hf, biases=biases(hf, attention=True, of_attention=QKV), **same, **more)


def nemotron(hf: Found) -> Config:
    refuse(hf, "rope_percent", but=hf.get("partial_rotary_factor", 0.5))
    norm = Norm(real(hf, "norm_eps", 1e-5), centred=True, plus_one=True, bias=True)
    return llama_like(hf, norm=norm, act=act(hf, "relu2"), gated=False, biases=biases(hf), rotated=0.5)


def exaone4(hf: Found) -> Config:
    """Where some layers have a window, only these are told positions."""
    window, every = (
        whole(hf, "sliding_window", None) if "sliding_window" in hf else 4096,
        hf.get("sliding_window_pattern", 4),
    )
    if window is not None and not isinstance(every, int) and not hf.get("layer_types"):
        raise ValueError(f"the config has sliding_window_pattern={every!r}: expected a number, or layer_types.")
    local = slides(hf, lambda i: window is not None and (i + 1) % every != 0)
    each = lambda i: {"window": window if local[i] else None} | ({} if window is None or local[i] else {"rope": None})
    return llama_like(hf, order="post", qk_norm="head", eps=1e-5, each=each)


def helium(hf: Found) -> Config:
    has_biases = biases(hf, of_attention=QKV)
    return llama_like(hf, biases=has_biases, interleaved=True, theta=1e5, eps=1e-8, usual_head_dim=128)


def ernie(hf: Found) -> Config:
    has_biases = QKVO | MLP if flag(hf, "use_bias", False) else frozenset()
    same: dict[str, Any] = {"interleaved": True, "theta": 5e5, "eps": 1e-5, "usual_head_dim": 128, "tied": True}
    return llama_like(hf, biases=has_biases, **same)


def seed_oss(hf: Found) -> Config:
    has_biases = biases(hf, attention=True, of_attention=QKV)
    more = {"o"} if flag(hf, "attention_out_bias", False) else set[str]()
    return llama_like(hf, biases=has_biases | more, usual_head_dim=128)


STABLELM = Family(("StableLmForCausalLM",), stablelm)
COHERE = Family(("CohereForCausalLM",), cohere)
COHERE2 = Family(("Cohere2ForCausalLM",), cohere2)
GLM = Family(("GlmForCausalLM",), glm)
GLM4 = Family(("Glm4ForCausalLM",), lambda hf: glm(hf, order="sandwich"), AFTER)
NEMOTRON = Family(("NemotronForCausalLM",), nemotron)
EXAONE4 = Family(("Exaone4ForCausalLM",), exaone4)
HELIUM = Family(("HeliumForCausalLM",), helium)
ERNIE = Family(("Ernie4_5ForCausalLM",), ernie)
SEED_OSS = Family(("SeedOssForCausalLM",), seed_oss)
FAMILIES = (STABLELM, COHERE, COHERE2, GLM, GLM4, NEMOTRON, EXAONE4, HELIUM, ERNIE, SEED_OSS)

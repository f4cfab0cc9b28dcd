"""Gemma 1 to 3: norms multiply by 1 + scale, embeddings by the root of the width; from 2 on before and after."""

from typing import Any

from awq_jax.models.families.common import (
    Config,
    Found,
    act,
    biases,
    ignored,
    llama_like,
    refuse,
    slides,
    whole,
    windows,
)
from awq_jax.models.family import Family
from awq_jax.models.fields import real
from awq_jax.models.layer import Norm
from awq_jax.models.rope_fields import ropes_by_kind

FOUR = {"attn_post_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm"}


def gemma(hf: Found, *, outer: dict[str, Any] | None = None, **same: Any) -> Config:
    refuse(hf, "use_bidirectional_attention")
    outer = {"embed_scale": whole(hf, "hidden_size") ** 0.5} | (outer or {})
    # hidden_act of the first releases says "gelu" and means its approximation; some name that beside it.
    named = act(hf, act(hf, "gelu_pytorch_tanh"), "hidden_activation")
    act_ = "gelu_pytorch_tanh" if named == "gelu" else named
    norm = Norm(real(hf, "rms_norm_eps", 1e-6), plus_one=True)
    return llama_like(hf, norm=norm, act=act_, biases=biases(hf), usual_head_dim=256, tied=True, outer=outer, **same)


def sandwich(hf: Found, cap: float | None, logit_cap: float | None, **same: Any) -> Config:
    """What Gemma 2 and 3 share, with the caps where the file does not say; null is none."""
    capped = lambda key, default: real(hf, key, None) if key in hf else default
    return gemma(
        hf,
        order="sandwich",
        attention_scale=real(hf, "query_pre_attn_scalar", 256.0) ** -0.5,
        attention_cap=capped("attn_logit_softcapping", cap),
        outer={"logit_cap": capped("final_logit_softcapping", logit_cap)},
        **same,
    )


def gemma2(hf: Found) -> Config:
    ignored(hf, "sliding_window_size")
    return sandwich(hf, 50.0, 30.0, each=windows(hf, lambda i: i % 2 == 0, 4096))


def gemma3(hf: Found) -> Config:
    every = whole(hf, "sliding_window_pattern", whole(hf, "_sliding_window_pattern", 6))
    local = slides(hf, lambda i: (i + 1) % every != 0)
    sees = windows(hf, local.__getitem__, 4096)
    thetas = {"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}
    ropes = ropes_by_kind(hf, whole(hf, "head_dim", 256), thetas)
    each = lambda i: sees(i) | {"rope": ropes["sliding_attention" if local[i] else "full_attention"]}
    return sandwich(hf, None, None, qk_norm="head", rope=None, each=each)


GEMMA = Family(("GemmaForCausalLM",), gemma)
GEMMA2 = Family(("Gemma2ForCausalLM",), gemma2, FOUR)
GEMMA3 = Family(("Gemma3ForCausalLM",), gemma3, FOUR)
FAMILIES = (GEMMA, GEMMA2, GEMMA3)

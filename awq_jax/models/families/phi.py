"""Phi 1 to 4: the first with attention and MLP in parallel, from 3 on Llamas of fused matrices."""

from awq_jax.models.families.common import QKVO, Config, Found, act, layer_norm, llama_like, refuse, whole
from awq_jax.models.family import Family


def phi(hf: Found) -> Config:
    refuse(hf, "qk_layernorm")
    return llama_like(
        hf,
        norm=layer_norm(hf),
        act=act(hf, "gelu_new"),
        order="parallel",
        gated=False,
        biases=QKVO | {"up", "down"},
        rotated=0.5,
        outer={"head_bias": True},
    )


def phi3(hf: Found) -> Config:
    refuse(hf, "full_attn_mod", but=1)
    fused = {"fused_qkv": "together", "fused_mlp": True}
    return llama_like(hf, **fused, rotated=1.0, eps=1e-5, window=whole(hf, "sliding_window", None))


PHI = Family(
    ("PhiForCausalLM",),
    phi,
    {
        "attn/o": "self_attn.dense",
        "mlp/up": "mlp.fc1",
        "mlp/down": "mlp.fc2",
        "norm": "model.final_layernorm",
    },
)
PHI3 = Family(("Phi3ForCausalLM",), phi3)
FAMILIES = (PHI, PHI3)

"""Tiny random models of transformers, one a family, and what the bridge makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from checkpoints import VOCAB, tokenizer
from rescaling import gauged, random_factors

import awq_jax as awq

KINDS = {
    "lm": "AutoModelForCausalLM",
    "mlm": "AutoModelForMaskedLM",
    "s2s": "AutoModelForSeq2SeqLM",
    "speech": "AutoModelForSpeechSeq2Seq",
    "audio": "AutoModelForCTC",
    "image": "AutoModelForImageClassification",
    "clip": "AutoModel",
    "vl": "AutoModelForImageTextToText",
}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
} | ENDS
BASE = ENCODER | {"num_key_value_heads": 2, "head_dim": 16}
WINDOW = BASE | {"sliding_window": 8}
MOE = BASE | {"moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
SHARED = MOE | {"shared_expert_intermediate_size": 48}
LATENT = BASE | {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128} | ENDS
SMALL = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2} | ENDS
MAMBA = SMALL | {"state_size": 8, "intermediate_size": 128, "time_step_rank": 4}
BOTH = {
    "vocab_size": 128,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 32,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(
        (
            "llama",
            "qwen2",
            "qwen3",
            "gemma",
            "phi",
            "phi3",
            "smollm3",
            "olmo",
            "olmo2",
            "granite",
            "stablelm",
            "cohere",
        ),
        ("lm", BASE),
    ),
    **dict.fromkeys(("glm", "glm4", "nemotron", "ernie4_5", "helium", "hunyuan_v1_dense", "seed_oss"), ("lm", BASE)),
    **dict.fromkeys(("mistral", "gemma2", "gemma3_text", "cohere2", "exaone4", "starcoder2"), ("lm", WINDOW)),
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe", "granitemoe", "phimoe"), ("lm", MOE | {"sliding_window": None})),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), ("lm", LATENT)),
    **dict.fromkeys(("bert", "roberta"), ("mlm", ENCODER)),
    **dict.fromkeys(("mamba", "falcon_mamba"), ("lm", MAMBA)),
    **dict.fromkeys(("vit", "dinov2"), ("image", VISION | {"num_labels": 7})),
    "qwen2_moe": ("lm", SHARED | {"decoder_sparse_step": 1}),
    "gpt_oss": ("lm", MOE | {"sliding_window": 8}),
    "llama4_text": (
        "lm",
        BASE
        | {"intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1, "attention_chunk_size": 32},
    ),
    "gpt2": ("lm", GPT2),
    "gptj": ("lm", GPT2 | {"rotary_dim": 8}),
    "gpt_neo": (
        "lm",
        SMALL
        | {
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "intermediate_size": 96,
            "max_position_embeddings": 128,
        },
    ),
    "gpt_neox": ("lm", ENCODER),
    "opt": ("lm", ENCODER | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "bloom": ("lm", SMALL | {"n_layer": 2, "n_head": 4}),
    "mpt": ("lm", {"vocab_size": 128, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "falcon": ("lm", SMALL | {"num_attention_heads": 4, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "lfm2": ("lm", BASE | {"full_attn_idxs": [1], "block_ff_dim": 96}),
    "dbrx": (
        "lm",
        {
            "vocab_size": 128,
            "d_model": 64,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        },
    ),
    "qwen3_next": (
        "lm",
        SHARED
        | {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "mamba2": (
        "lm",
        SMALL | {"state_size": 8, "num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1, "chunk_size": 8},
    ),
    "jamba": (
        "lm",
        BASE
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": (
        "lm",
        BASE
        | {
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
            "mamba_expand": 2,
        },
    ),
    "minimax": ("lm", MOE | {"layer_types": ["linear_attention", "full_attention"], "block_size": 8}),
    "recurrent_gemma": (
        "lm",
        BASE | {"lru_width": 64, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    ),
    "rwkv": ("lm", SMALL | {"attention_hidden_size": 64, "context_length": 64, "intermediate_size": 96}),
    "modernbert": (
        "mlm",
        ENCODER | {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "distilbert": ("mlm", SMALL | {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96}),
    "electra": ("mlm", ENCODER | {"embedding_size": 32}),
    "deberta-v2": (
        "mlm",
        ENCODER
        | {
            "relative_attention": True,
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
        },
    ),
    "t5": (
        "s2s",
        {
            "vocab_size": 128,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "bart": ("s2s", BOTH | {"max_position_embeddings": 128}),
    "whisper": (
        "speech",
        BOTH
        | ENDS
        | {"num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 64, "decoder_start_token_id": 1},
    ),
    "wav2vec2": (
        "audio",
        ENCODER
        | {
            "conv_dim": [32, 32],
            "conv_stride": [5, 4],
            "conv_kernel": [10, 5],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 4,
        },
    ),
    "clip": (
        "clip",
        {"text_config": ENCODER | {"projection_dim": 32}, "vision_config": VISION, "projection_dim": 32},
    ),
    "siglip": ("clip", {"text_config": ENCODER | {"projection_size": 64}, "vision_config": VISION}),
    "convnext": (
        "image",
        {"num_channels": 3, "hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2, "num_labels": 7},
    ),
    "swin": (
        "image",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 32,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "num_labels": 7,
        },
    ),
    "qwen2_5_vl": (
        "vl",
        {
            "text_config": BASE | {"rope_parameters": MROPE},
            "vision_config": {
                "hidden_size": 64,
                "depth": 2,
                "num_heads": 4,
                "intermediate_size": 96,
                "out_hidden_size": 64,
                "patch_size": 4,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            "image_token_id": 5,
            "video_token_id": 6,
            "vision_start_token_id": 7,
            "vision_end_token_id": 8,
        },
    ),
}


def tiny(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model whose norms and biases are not ones and zeros, and inputs for it."""
    kind, fields = FAMILIES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **fields)
    model = getattr(transformers, KINDS[kind]).from_config(config, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    noise = lambda *shape: torch.randn(shape, generator=generator)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise(*p.shape) * (0.1 if p.ndim == 1 else 0.05))
    ids = torch.randint(9, 100, (2, 24), generator=generator)
    picture = {"pixel_values": noise(2, 3, 32, 32)}
    inputs = {
        "s2s": {"input_ids": ids, "decoder_input_ids": ids[:, :12]},
        "speech": {"input_features": noise(2, 16, 64), "decoder_input_ids": ids[:, :12]},
        "audio": {"input_values": noise(2, 800)},
        "image": picture,
        "clip": {"input_ids": ids} | picture,
    }
    return model.eval(), inputs.get(kind, {"input_ids": ids})


def folder(path: Path, name: str, **changes: Any) -> tuple[Path, Any]:
    """A tiny model, as transformers saves it, with a tokenizer; the model too."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **FAMILIES[name][1] | {"vocab_size": VOCAB} | changes)
    model = getattr(transformers, KINDS[FAMILIES[name][0]]).from_config(config)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path, model


@dataclass(frozen=True)
class Bridged:
    """A tiny model through the bridge: `fn(params, *inputs)` gives its logits, `want` are torch's."""

    model: Any
    fn: Callable[..., Any]
    params: dict[str, Any]
    inputs: tuple[np.ndarray, ...]
    want: np.ndarray

    @property
    def error(self) -> float:
        """The largest difference to torch's logits, over the largest of these."""
        return self.apart(jax.jit(self.fn)(self.params, *self.inputs))

    def apart(self, logits: Any) -> float:
        return float(np.abs(np.asarray(logits) - self.want).max() / np.abs(self.want).max())

    @property
    def linears(self) -> dict[str, str]:
        """By the name of each of torch's linears that of its param."""
        first: dict[int, str] = {}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            first.setdefault(id(p), name)
        modules = self.model.named_modules()
        is_linear = lambda m: isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"
        return {n: first[id(m.weight)] for n, m in modules if is_linear(m)}


def bridged(name: str) -> Bridged:
    model, inputs = tiny(name)
    with torch.no_grad():
        out = model(**inputs)
    logits = "logits_per_image" if FAMILIES[name][0] == "clip" else "logits"
    whole, params = awq.from_torch(model, **inputs)
    fn = lambda params, *arrays: whole(params, **dict(zip(inputs, arrays, strict=True)))[logits]
    return Bridged(model, fn, params, tuple(x.numpy() for x in inputs.values()), getattr(out, logits).numpy())


def refolded(found: Bridged, traced: Any) -> Any:
    """Logits after every fold was made with random factors, all at once."""
    rng = np.random.default_rng(0)
    changes = []
    for fold in traced.folds:
        factors = random_factors(fold, traced, found.params, rng)
        changes += [(member, factors) for member in fold.members]
    return jax.jit(found.fn)(jax.tree.map(jnp.asarray, gauged(found.params, changes)), *found.inputs)

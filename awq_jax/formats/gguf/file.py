"""GGUF files of Llama architecture, read as if they were Hugging Face checkpoints: names, config, orientation.

llama.cpp interleaves the two rotary halves of q and k heads when it converts (convert_hf_to_gguf.py, `permute`); that
is undone here. Weights are dequantized by the gguf package, to float32.
"""

from __future__ import annotations

import functools as ft
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jaxtyping import Float, UInt8

from awq_jax.errors import InputError
from awq_jax.formats.gguf.header import Entry, Header, read_header
from awq_jax.formats.safetensors import mapped
from awq_jax.formats.stored import StoredTensor
from awq_jax.models.family import GGUF, HF

OUTER = ("embed", "norm", "head")
OUTER_NAMES = {name: HF[module] for module, name in GGUF.items() if module in OUTER}
LAYER_NAMES = {name: HF[module] for module, name in GGUF.items() if module not in OUTER}
ROPE_FACTORS = "rope_freqs.weight"
END_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
END_NAMES = {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>"}
"""Tokens that llama.cpp takes for an end whatever the metadata says (src/llama-vocab.cpp, special_eog_ids)."""
ELSEWHERE = "Take the model's safetensors from its Hugging Face repository instead."
AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Gguf:
    """A GGUF file: the config.json it amounts to, its tensors by Hugging Face name, its metadata."""

    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    metadata: Mapping[str, Any]


def open_gguf(file: Path) -> Gguf:
    """Reads the header only; tensors are mapped and dequantized one at a time.

    Raises:
      InputError: a damaged file, another architecture than llama, a part of a split file, a tensor of unknown name or
        in a type that the gguf package cannot dequantize.
    """
    header = read_header(file)
    architecture = header.metadata.get("general.architecture")
    if architecture != "llama":
        raise InputError(
            f"{file}: general.architecture is {architecture!r}; only 'llama' is read from GGUF. {ELSEWHERE}"
        )
    if (parts := header.metadata.get("split.count", 1)) not in (0, 1):
        raise InputError(f"{file} is one of {parts} parts: join them first, with llama.cpp's llama-gguf-split --merge.")
    config = llama_config(file, header)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for name, entry in header.entries.items():
        if name == ROPE_FACTORS:
            continue
        refuse_type(file, name, entry)
        hf_name, kind = hugging_face_name(file, name)
        if kind in heads and entry.shape[:1] != (heads[kind] * config["head_dim"],):
            raise InputError(
                f"{file}: {name} has shape {entry.shape}, not {heads[kind]} heads of {config['head_dim']}."
            )
        tensors[hf_name] = StoredTensor(
            entry.shape, entry.nbytes, reader(file, entry, heads.get(kind)), stored_as=entry.type.name
        )
    return Gguf(config, tensors, header.metadata)


def hugging_face_name(file: Path, name: str) -> tuple[str, str]:
    """(Hugging Face name, what llama.cpp calls the layer) of a tensor."""
    parts = re.fullmatch(r"(?:blk\.(?P<layer>\d+)\.)?(?P<kind>\w+)\.(?P<what>weight|bias)", name)
    if parts:
        layer, kind, what = parts["layer"], parts["kind"], parts["what"]
        if layer is None and kind in OUTER_NAMES:
            return f"{OUTER_NAMES[kind]}.{what}", kind
        if layer is not None and kind in LAYER_NAMES:
            return f"model.layers.{layer}.{LAYER_NAMES[kind]}.{what}", kind
    raise InputError(f"{file}: the tensor {name} has no place in a dense Llama model. {ELSEWHERE}")


def reader(file: Path, entry: Entry, heads: int | None) -> Any:
    def read() -> Float[np.ndarray, "*shape"]:
        w = dequantized(mapped(file, entry.offset, (entry.nbytes,), np.dtype(np.uint8)), entry.shape, entry.type)
        return w if heads is None else halves_joined(w, heads)

    return read


def dequantized(
    raw: UInt8[np.ndarray, " n"], shape: tuple[int, ...], kind: gguf.GGMLQuantizationType
) -> Float[np.ndarray, "*shape"]:
    """The tensor in float32; float32 itself is not copied."""
    if kind == gguf.GGMLQuantizationType.F32:
        return raw.view("<f4").reshape(shape)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = raw.reshape(-1, shape[-1] // block * block_bytes)
    out = np.empty((len(rows), shape[-1]), np.float32)
    step = max(1, AT_ONCE // shape[-1])
    for i in range(0, len(rows), step):
        out[i : i + step] = gguf.dequantize(rows[i : i + step], kind)
    return out.reshape(shape)


def halves_joined(w: Float[np.ndarray, "*shape"], heads: int) -> Float[np.ndarray, "*shape"]:
    """Rows of each head from llama.cpp's order (0, d/2, 1, d/2 + 1, ...) back to 0 .. d - 1."""
    return w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def refuse_type(file: Path, name: str, entry: Entry) -> None:
    if not known(entry.type):
        raise InputError(
            f"{file}: {name} is stored as {entry.type.name}, which the gguf package cannot dequantize: take a file "
            "in another type, such as Q8_0."
        )


@ft.cache
def known(kind: gguf.GGMLQuantizationType) -> bool:
    """Whether the gguf package can dequantize this type; it has no list, so one block is tried."""
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def rounded(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def field(file: Path, m: Mapping[str, Any], key: str, default: Any) -> Any:
    """A number or word of the metadata, of the default's type; where the default is a type, it has to be there."""
    kind = default if isinstance(default, type) else type(default)
    value = m.get(key, default)
    if type(value) is not kind or (kind is not str and value <= 0):
        raise InputError(f"{file}: {key} is {m.get(key)!r}, not one {kind.__name__}. {ELSEWHERE}")
    return value


def llama_config(file: Path, header: Header) -> dict[str, Any]:
    """The config.json of the model, in the spelling that transformers 4 and 5 both read."""
    m, entries = header.metadata, header.entries
    number = lambda key, default: field(file, m, f"llama.{key}", default)
    if "token_embd.weight" not in entries:
        raise InputError(f"{file} has no token_embd.weight: it holds no whole model. {ELSEWHERE}")
    heads, width = number("attention.head_count", int), number("embedding_length", int)
    head_dim = number("attention.key_length", width // heads)
    if (rotated := number("rope.dimension_count", head_dim)) != head_dim:
        raise InputError(f"{file} rotates {rotated} of the {head_dim} channels of a head: not read. {ELSEWHERE}")
    theta = rounded(number("rope.freq_base", 10000.0))
    factors = dequantize_factors(file, entries[ROPE_FACTORS]) if ROPE_FACTORS in entries else None
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length", int),
        "num_hidden_layers": number("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": number("context_length", int),
        "rms_norm_eps": rounded(number("attention.layer_norm_rms_epsilon", float)),
        "rope_theta": theta,
        "rope_scaling": rope_scaling(file, m, factors, theta, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in entries,
        "mlp_bias": "blk.0.ffn_up.bias" in entries,
        "tie_word_embeddings": "output.weight" not in entries,
        "vocab_size": entries["token_embd.weight"].shape[0],
        "bos_token_id": m.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends(m),
        "pad_token_id": m.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def ends(m: Mapping[str, Any]) -> Any:
    """The token that ends a text, a list where there are several, None where there is none."""
    named = [i for i, token in enumerate(m.get("tokenizer.ggml.tokens", ())) if token in END_NAMES]
    found = list(dict.fromkeys([*(m[key] for key in END_KEYS if m.get(key) is not None), *named]))
    return found if len(found) > 1 else next(iter(found), None)


def dequantize_factors(file: Path, entry: Entry) -> Float[np.ndarray, " half"]:
    refuse_type(file, ROPE_FACTORS, entry)
    return reader(file, entry, None)()


def rope_scaling(
    file: Path, m: Mapping[str, Any], factors: Float[np.ndarray, " half"] | None, theta: float, head_dim: int
) -> dict[str, Any] | None:
    """`rope_scaling` of config.json from the metadata or, for Llama 3.1 and later, from the stored factors.

    llama.cpp keeps the outcome of Llama 3's rule, a factor a frequency, and drops the rule's four numbers. Three of
    them are the same in every release, the fourth is the largest factor; what they give is compared with the file.
    """
    kind = field(file, m, "llama.rope.scaling.type", "linear" if "llama.rope.scale_linear" in m else "none")
    if factors is not None and kind != "none":
        raise InputError(f"{file} has {ROPE_FACTORS} and llama.rope.scaling.type {kind!r}: not read. {ELSEWHERE}")
    if factors is not None:
        rule = {
            "rope_type": "llama3",
            "factor": rounded(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if not np.allclose(llama3_factors(rule, theta, head_dim), factors, rtol=1e-4):
            raise InputError(f"{file}: {ROPE_FACTORS} is not what Llama 3's rule gives. {ELSEWHERE}")
        return rule
    if kind == "none":
        return None
    if kind != "linear":
        raise InputError(f"{file}: llama.rope.scaling.type is {kind!r}; 'none' and 'linear' are read. {ELSEWHERE}")
    older = field(file, m, "llama.rope.scale_linear", 1.0)
    return {"rope_type": kind, "factor": rounded(field(file, m, "llama.rope.scaling.factor", older))}


def llama3_factors(rule: Mapping[str, Any], theta: float, head_dim: int) -> Float[np.ndarray, " half"]:
    """What Llama 3.1 divides each rotary frequency by (transformers' _compute_llama3_parameters)."""
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = rule["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rule["low_freq_factor"], rule["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (kept + (1 - kept) / rule["factor"])

"""Small models on disk: Hugging Face folders with safetensors, and GGUF files of random Llamas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from safetensors.numpy import save_file

from awq_jax.formats.gguf.file import LAYER_NAMES, OUTER_NAMES

HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 256, 512, 8, 4, 32, 64, 2
"""Rows of 256, which K-quants need."""

HEADS_OF = {"attn_q": HEADS, "attn_k": KV_HEADS}
SHAPES = {
    "token_embd": (VOCAB, HIDDEN),
    "output_norm": (HIDDEN,),
    "output": (VOCAB, HIDDEN),
    "attn_norm": (HIDDEN,),
    "ffn_norm": (HIDDEN,),
    "attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "ffn_gate": (MLP, HIDDEN),
    "ffn_up": (MLP, HIDDEN),
    "ffn_down": (HIDDEN, MLP),
}


@dataclass(frozen=True)
class Source:
    """What a writer takes from a dense model."""

    config: Mapping[str, Any]
    companions: tuple[Path, ...] = ()


def hf_folder(
    folder: Path, shards: Mapping[str, Mapping[str, np.ndarray]], config: Mapping[str, Any] | None = None
) -> Path:
    """A folder with config.json, one safetensors file for each of `shards` and, if several, their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | dict(config or {})))
    for file, tensors in shards.items():
        save_file(dict(tensors), folder / file)
    if len(shards) > 1:
        where = {name: file for file, tensors in shards.items() for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def llama_weights(tied: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights by GGUF name, in Hugging Face orientation and row order."""
    rng = np.random.default_rng(seed)
    outer = [k for k in OUTER_NAMES if not (tied and k == "output")]
    names = [f"{k}.weight" for k in outer] + [f"blk.{i}.{k}.weight" for i in range(LAYERS) for k in LAYER_NAMES]
    return {name: rng.normal(size=SHAPES[kind_of(name)]).astype(np.float32) for name in names}


def kind_of(name: str) -> str:
    return name.split(".")[-2]


def halves_interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `permute` (convert_hf_to_gguf.py) of the rows of q and k."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def block_bytes(rows: int, columns: int, kind: T, rng: np.random.Generator) -> np.ndarray:
    """Random bytes of a quantized matrix whose float16 fields are all moderate numbers."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, size=(rows, columns // block, size), dtype=np.uint8)
    fields = {T.Q2_K: (80, 82), T.Q3_K: (108,), T.Q6_K: (208,), T.Q4_K: (0, 2), T.Q5_K: (0, 2)}
    for at in fields.get(kind, (0,) if kind in (T.Q4_0, T.Q5_0, T.Q8_0) else (0, 2)):
        raw[..., at : at + 2] = rng.uniform(0.01, 0.1, raw.shape[:2]).astype("<f2")[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def write_gguf(
    file: Path,
    weights: Mapping[str, np.ndarray],
    kind: T = T.F32,
    *,
    architecture: str = "llama",
    changes: Mapping[str, Any] | None = None,
    more_tensors: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Write a Llama; matrices other than the embedding are stored as `kind`. Returns what each dequantizes to.

    Args:
      weights: by GGUF name, rows of q and k in Hugging Face's order.
      changes: metadata to add, or to replace or drop (None).
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(file, architecture)
    metadata = {
        "block_count": LAYERS,
        "context_length": 512,
        "embedding_length": HIDDEN,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": HEAD_DIM,
    }
    for key, value in ({f"llama.{k}": v for k, v in metadata.items()} | dict(changes or {})).items():
        add(writer, key, value)
    expected = {}
    for name, w in weights.items():
        heads = HEADS_OF.get(kind_of(name))
        w = w if heads is None else halves_interleaved(w, heads)
        stored = kind if w.ndim == 2 and kind_of(name) != "token_embd" else T.F32
        try:
            data = gguf.quantize(w, stored)
        except NotImplementedError:
            data = block_bytes(*w.shape, stored, rng)
        writer.add_tensor(name, data, raw_dtype=stored)
        dense = gguf.dequantize(data, stored).reshape(w.shape)
        if heads is not None:
            dense = dense.reshape(heads, -1, 2, HIDDEN).swapaxes(1, 2).reshape(w.shape)
        expected[name] = dense
    for name, w in (more_tensors or {}).items():
        writer.add_tensor(name, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)

"""Tiny Llamas with all that belongs to a model on disk: a Hugging Face folder, and a GGUF file."""

from __future__ import annotations

import functools as ft
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from folders import hf_folder, llama_weights, write_gguf
from gguf import GGMLQuantizationType
from tiny import hf_config, random_params
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from vocabularies import byte_level

from awq_jax.commands.demo import evaluation_text
from awq_jax.models import for_config

VOCAB = 320
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OUTLIERS = [3, 17, 40]
"""Channels that the norms enlarge 8 times and the matrices after them take back: what scales are there to mend."""


@ft.cache
def tokenizer() -> Any:
    """A byte-level BPE of 320 tokens, trained on English."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [evaluation_text()[:20000]],
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=["<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def config(**changes: Any) -> dict[str, Any]:
    """The config.json: 64 wide, 128 in the MLP, 2 layers."""
    return hf_config(**{"vocab_size": VOCAB, "intermediate_size": 128} | changes)


def tensors(hf: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights by Hugging Face name, float32."""
    family = for_config(hf)
    params = random_params(family.config(hf), seed)
    found = {name: np.array(w) for name, w in sorted(family.to_names(params).items())}
    for name, w in found.items():
        if name.endswith("layernorm.weight") and w.size > max(OUTLIERS):
            w[OUTLIERS] *= 8
        if "_proj" in name:
            w /= 2
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") and w.shape[1] > max(OUTLIERS):
            w[:, OUTLIERS] /= 8
    return found


def tiny_folder(
    folder: Path, *, shards: int = 1, weights: Mapping[str, np.ndarray | None] | None = None, **changes: Any
) -> Path:
    """A Hugging Face folder.

    Args:
      shards: safetensors files.
      weights: replace those of the same name; None drops one.
      changes: of config.json.
    """
    hf = config(**changes)
    named = {k: w for k, w in (tensors(hf) | dict(weights or {})).items() if w is not None}
    if shards == 1:
        files = {"model.safetensors": named}
    else:
        file = "model-{:05}-of-{:05}.safetensors"
        files = {file.format(k + 1, shards): dict(list(named.items())[k::shards]) for k in range(shards)}
    hf_folder(folder, files, hf)
    tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    return folder


def tiny_gguf(file: Path, **options: Any) -> Path:
    """A GGUF file in 8 bits, 256 wide; `options` are write_gguf's."""
    vocabulary = byte_level()
    rng = np.random.default_rng(0)
    weights = {name: w / 16 if w.ndim == 2 else w for name, w in llama_weights().items()}
    weights["token_embd.weight"] = rng.normal(size=(len(vocabulary["tokenizer.ggml.tokens"]), 256)).astype(np.float32)
    changes = vocabulary | options.pop("changes", {})
    write_gguf(file, weights, options.pop("kind", GGMLQuantizationType.Q8_0), changes=changes, **options)
    return file

"""Tiny models of every family, made by transformers on torch with random weights, as it saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

VOCAB, LENGTH = 96, 24
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config(architecture: str, changes: dict[str, Any]) -> Any:
    """transformers' config; `...` in `changes` drops what BASE has."""
    options = {key: value for key, value in (BASE | changes).items() if value is not ...}
    return getattr(transformers, architecture).config_class(**options)


def made(architecture: str, folder: Path, changes: dict[str, Any]) -> Any:
    """The torch model, which is saved in `folder`."""
    cls = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = cls._from_config(config(architecture, changes), attn_implementation="eager").eval().float()
    with torch.no_grad():
        for w in model.parameters():
            w.copy_(torch.randn_like(w) * (0.3 if w.ndim == 1 else w.shape[-1] ** -0.5))
    model.save_pretrained(folder)
    return model


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCAB, (2, LENGTH)).astype(np.int32)


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens()).long()).logits.float().numpy()

"""What a checkpoint holds and what is computed agree: every tensor is read, and has the shape that is asked for.

A tensor that nothing reads is part of the model that its maker ran, so leaving it out computes another one in silence.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax.errors import InputError
from awq_jax.formats.checkpoint import Checkpoint
from awq_jax.models.family import Family, param_shapes
from awq_jax.models.layer import Config
from awq_jax.transforms.recipe import some
from awq_jax.weights.paths import named_leaves
from awq_jax.weights.tensor import is_quantized

Shapes = Mapping[str, tuple[int, ...]]

UNREAD = {
    r"^(base_model\.model|_orig_mod|module)\.": "they were saved from within a wrapper (PEFT, torch.compile, data "
    "parallel): save what is in it with save_pretrained",
    r"lora_|\.base_layer\.": "a LoRA adapter is not merged: save what PEFT's merge_and_unload() gives",
    r"^lm_head\.weight$": "the config ties the head to the embedding, and this one has other values: set "
    "tie_word_embeddings to false to use it, or remove it",
    r"_proj\.bias$": "set attention_bias (q, k, v, o) or mlp_bias (gate, up, down) to true in config.json if the model "
    "was trained with them; with a part of these it is another architecture",
    r"\.[qk]_norm\.": "norms of q and k belong to another architecture than the config names",
    r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_scale|weight_scale_inv|absmax|SCB)$": "they are quantized "
    "in a way that config.json does not say: start from the dense model",
    "": "they belong to another architecture than the config names, or to no model",
}
"""What the name of a tensor that nothing reads tells about why; the first that matches."""

MISSING = {
    r"^lm_head\.weight$|^head/": "If the head is the embedding, set tie_word_embeddings to true. ",
    r"bias$": "If the model has no biases, set attention_bias and mlp_bias to false. ",
    "": "",
}
"""What to try when a tensor of such a name is missing."""

INTEGERS = re.compile(r"(u?int|I)\d+|bool")
"""How the types that hold no weights are called in files."""
LAYER = r"^layers_(\d+)/"
"""The number of a layer in the path of a param."""
AT_ONCE = 1 << 22
"""Numbers that are compared at a time."""


def check_tensors(checkpoint: Checkpoint, family: Family, config: Config) -> None:
    """Passes if `family` reads every tensor of the checkpoint and finds all that `config` asks for.

    Headers tell; weights are read only to compare a tied head with the embedding.

    Raises:
      InputError: a tensor that is missing, of another shape, of integers, or read by nothing; the likely cause and
        what to do.
    """
    if checkpoint.kind == "orbax":
        return
    found = {name: t.shape[::-1] if t.quantized else t.shape for name, t in checkpoint.tensors.items()}
    ignored = {name for name in found if re.search(family.ignored, name)}
    if config.tied and is_tied_head(checkpoint, family):
        ignored.add(family.name_of("head/kernel"))
    found = {name: shape for name, shape in found.items() if name not in ignored}
    compare(checkpoint.path, found, partial(family.stored_shapes, config), len(config.layers), family.numbers)
    refuse_integers(checkpoint, found)


def refuse_integers(checkpoint: Checkpoint, weights: Iterable[str]) -> None:
    """Passes if none of the tensors that are weights is of integers."""
    for name in weights:
        if INTEGERS.fullmatch(stored_as := checkpoint.tensors[name].stored_as):
            raise InputError(
                f"{checkpoint.path}: {name} is of {stored_as}, which are the codes of a quantization that config.json "
                "does not name. Start from the dense model."
            )


def check_params(path: Path, params: Any, config: Config) -> None:
    """The same of params in memory.

    Raises:
      InputError: see `check_tensors`.
    """
    found = {name: tuple(np.shape(leaf)) for name, leaf in named_leaves(params).items()}
    compare(path, found, partial(param_shapes, config), len(config.layers), LAYER)


def compare(where: Path, found: Shapes, wanted: Callable[[], Shapes], layers: int, number: str) -> None:
    """Refuse shapes that are not those `wanted`, which are not made before the number of layers is right.

    Args:
      number: a regular expression for that of a layer in a name.
    """
    there = len({match[1] for name in found if (match := re.search(number, name))})
    if there != layers:
        raise InputError(
            f"{where}: the config counts {layers} layers (num_hidden_layers), the weights have {there}. Does "
            "config.json belong to these weights?"
        )
    asked = wanted()
    unread = [name for name in found if name not in asked]
    for name, shape in asked.items():
        if name not in found:
            near = difflib.get_close_matches(name, unread, n=1)
            raise InputError(
                f"{where} has no tensor {name} among its {len(found)}{f'; near it: {near[0]}' if near else ''}. "
                f"{first(MISSING, [name])}{f'Nothing reads {why(unread)}. ' if unread else ''}"
                "Does config.json belong to these weights?"
            )
        if found[name] != shape:
            raise InputError(
                f"{where}: {name} has shape {found[name]}, the config asks for {shape}. Is config.json that of these "
                "weights?"
            )
    if unread:
        raise InputError(f"{where} has {len(found)} tensors, of which nothing reads {why(unread)}.")


def why(unread: Sequence[str]) -> str:
    """Names, and the reason why nothing reads them."""
    return f"{len(unread)} ({some(list(unread))}): {first(UNREAD, unread)}"


def first(reasons: Mapping[str, str], names: Iterable[str]) -> str:
    """The first reason whose pattern one of the names matches."""
    return next(reason for pattern, reason in reasons.items() if any(re.search(pattern, name) for name in names))


def is_tied_head(checkpoint: Checkpoint, family: Family) -> bool:
    """Whether the checkpoint holds a head with the embedding's values."""
    names = family.name_of("head/kernel"), family.name_of("embed/embedding")
    return checkpoint.names.issuperset(names) and same_values(checkpoint, *names)


def same_values(checkpoint: Checkpoint, name: str, other: str) -> bool:
    """Whether two dense tensors are equal; read a part at a time."""
    a, b = checkpoint.read(name), checkpoint.read(other)
    if is_quantized(a) or is_quantized(b) or a.shape != b.shape:
        return False
    rows = max(1, AT_ONCE // max(1, a.shape[-1]))
    return all(np.array_equal(a[k : k + rows], b[k : k + rows]) for k in range(0, len(a), rows))

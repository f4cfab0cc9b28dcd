"""The Rope of a config.json: rope_theta and rope_scaling (transformers 4) or rope_parameters (5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float

from awq_jax.models.fields import NotComputed, Watched, each_real, flag, mapping, real, share, whole
from awq_jax.models.rope import Rope

Found = Mapping[str, Any]
NEUTRAL = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
"""What is read of every kind."""


def rope_of(
    hf: Found, head_dim: int, *, theta: float = 10000.0, rotated: float | None = None, interleaved: bool = False
) -> Rope:
    """Of a model with one rope for all layers.

    Args:
      theta: where the config names none.
      rotated: share of the channels where the config names none; None where the family rotates whole heads only.

    Raises:
      ValueError: a kind that is not computed, or a field that is missing, not read or cannot be.
    """
    older, newer = mapping(hf, "rope_scaling"), mapping(hf, "rope_parameters")
    if nested := [key for rope in (older, newer) for key, value in rope.items() if isinstance(value, Mapping)]:
        raise ValueError(f"rope parameters for {nested}: this model has one rope for all layers.")
    found = older or newer
    named = next((rope for rope in (found, hf, newer) if rope.get("rope_theta") is not None), hf)
    return one_rope(hf, found, real(named, "rope_theta", theta), head_dim, rotated, interleaved)


def ropes_by_kind(hf: Found, head_dim: int, thetas: Mapping[Any, tuple[str, float]]) -> dict[str, Rope]:
    """Of a model whose kinds of layers have ropes of their own: nested rope_parameters, or fields of their own.

    Args:
      thetas: for each kind of layer the field that older configs have for its theta, and its default.
    """
    newer, older = Watched(mapping(hf, "rope_parameters")), mapping(hf, "rope_scaling")
    ropes = {}
    for kind, (field, default) in thetas.items():
        found = mapping(newer, kind)
        theta = real(found or hf, "rope_theta" if found else field, default)
        # What older configs scale are the layers that see all.
        scaling = found or (older if kind == "full_attention" else {})
        ropes[kind] = one_rope(hf, scaling, theta, head_dim)
    newer.refuse_unread(f"the rope parameters, which this model has for each of {', '.join(thetas)}, say")
    return ropes


def one_rope(
    hf: Found, found: Found, theta: float, head_dim: int, rotated: float | None = None, interleaved: bool = False
) -> Rope:
    """The Rope of one object of rope parameters."""
    found = Watched(found)
    hf.get("original_max_position_embeddings")  # No matter to most kinds.
    kind = found.get("rope_type") or found.get("type") or "default"
    if not isinstance(kind, str):
        raise ValueError(f"rope type {kind!r}: expected the name of one.")
    if kind not in KINDS:
        raise NotComputed("rope_type", f"rope type {kind!r}: this model knows {', '.join(map(repr, KINDS))}.")
    part = found if found.get("partial_rotary_factor") is not None else hf
    if rotated is None:
        if (other := part.get("partial_rotary_factor")) not in (None, 1, 1.0):
            raise ValueError(f"partial_rotary_factor={other}: this model rotates whole heads only.")
    else:
        rotated = share(part, "partial_rotary_factor", rotated)
    rope = KINDS[kind](Rope(int(head_dim * (rotated or 1)), theta, interleaved=interleaved), found, hf)
    found.refuse_unread(f"the {kind} rope parameters have", NEUTRAL)
    return rope


def default(rope: Rope, found: Found, hf: Found) -> Rope:
    return rope


def linear(rope: Rope, found: Found, hf: Found) -> Rope:
    return replace(rope, divide=real(found, "factor", where="the linear rope parameters"))


def llama3(rope: Rope, found: Found, hf: Found) -> Rope:
    """Those that turn fewer than `low` times in the original length are divided by the factor, those that turn more
    than `high` times kept, blended between."""
    where = "the llama3 rope parameters"
    factor = real(found, "factor", where=where)
    low, high = (real(found, f"{end}_freq_factor", where=where) for end in ("low", "high"))
    if low >= high:
        raise ValueError(f"{where} have low_freq_factor={low} and high_freq_factor={high}: expected low < high.")
    turns = original(found, hf) * rope.frequencies() / np.float32(2 * np.pi)
    return blended(rope, np.clip((turns - low) / (high - low), 0, 1), factor)


def yarn(rope: Rope, found: Found, hf: Found) -> Rope:
    """YaRN (arXiv 2309.00071): those that turn often are kept, the others divided, and logits are sharper."""
    where = "the yarn rope parameters"
    length = original(found, hf)
    factor = real(found, "factor", None, where) or whole(hf, "max_position_embeddings") / length
    place = lambda turns: rope.rotated * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
    low, high = (
        place(real(found, "beta_fast", None, where) or 32.0),
        place(real(found, "beta_slow", None, where) or 1.0),
    )
    if flag(found, "truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotated - 1)
    ramp = (np.arange(rope.rotated // 2, dtype=np.float32) - low) / ((high - low) or 0.001)
    scales = [real(found, name, None, where) for name in ("mscale", "mscale_all_dim")]
    sharp = sharper(factor, scales[0]) / sharper(factor, scales[1]) if all(scales) else sharper(factor)
    magnitude = real(found, "attention_factor", None, where) or sharp
    return replace(blended(rope, 1 - np.clip(ramp, 0, 1), factor), magnitude=magnitude)


def sharper(factor: float, scale: float = 1.0) -> float:
    """By what YaRN multiplies q and k."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def blended(rope: Rope, kept: Float[np.ndarray, " half"], factor: float) -> Rope:
    """`rope` with the share `kept` of each frequency as it is, the rest of it divided."""
    kept = kept.astype(np.float32)
    return replace(rope, divide=tuple(map(float, 1 / (kept + (1 - kept) / np.float32(factor)))))


def longrope(rope: Rope, found: Found, hf: Found) -> Rope:
    """LongRoPE (arXiv 2402.13753): other factors for texts beyond the original length."""
    where, length = "the longrope rope parameters", original(found, hf)
    short, long = (each_real(found, f"{which}_factor", rope.rotated // 2, where) for which in ("short", "long"))
    factor = real(found, "factor", None, where) or whole(hf, "max_position_embeddings") / length
    sharp = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))
    magnitude = real(found, "attention_factor", None, where) or sharp
    return replace(rope, divide=short, beyond=long, trained=length, magnitude=magnitude)


def dynamic(rope: Rope, found: Found, hf: Found) -> Rope:
    """theta grows with the length of texts beyond that of training."""
    where = "the dynamic rope parameters"
    # Some name it and mean the same as max_position_embeddings, which alone is read.
    found.get("original_max_position_embeddings")
    return replace(rope, growth=real(found, "factor", where=where), trained=whole(hf, "max_position_embeddings"))


def original(found: Found, hf: Found) -> int:
    """Positions before the rope was stretched."""
    for place, where in (
        (found, f"the {found.get('rope_type') or found.get('type')} rope parameters"),
        (hf, "the config"),
    ):
        if (length := whole(place, "original_max_position_embeddings", None, where)) is not None:
            return length
    return whole(hf, "max_position_embeddings")


KINDS: dict[str, Callable[[Rope, Found, Found], Rope]] = {
    "default": default,
    "linear": linear,
    "llama3": llama3,
    "yarn": yarn,
    "longrope": longrope,
    "su": longrope,
    "dynamic": dynamic,
}
"""By rope_type."""

"""What config.json files of most families have in common, as keyword arguments of `Layer` and `Config`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from awq_jax.models.fields import LAYERS, NotComputed, flag, listed, mapping, real, whole
from awq_jax.models.layer import Config, Layer, Norm
from awq_jax.models.mlp import ACTIVATIONS
from awq_jax.models.rope_fields import rope_of

Found = Mapping[str, Any]
QKV = frozenset("qkv")
QKVO = frozenset("qkvo")
MLP = frozenset({"gate", "up", "down"})


def llama_like(
    hf: Found,
    *,
    each: Callable[[int], Mapping[str, Any]] = lambda i: {},
    outer: Mapping[str, Any] | None = None,
    tied: bool = False,
    eps: float = 1e-6,
    usual_head_dim: int | None = None,
    theta: float = 10000.0,
    rotated: float | None = None,
    interleaved: bool = False,
    **same: Any,
) -> Config:
    """The Config of a file that spells its sizes like Llama's.

    Args:
      each: what differs in layer i.
      outer: what differs outside of the layers.
      tied, eps, usual_head_dim, theta, rotated: what a file means that does not say.
      same: what differs in all layers from a Llama, and what the file is not asked for.
    """
    width, heads = whole(hf, "hidden_size"), whole(hf, "num_attention_heads")
    dim = whole(hf, "head_dim", None) if "head_dim" in hf else usual_head_dim
    if dim is None and width % heads:
        raise ValueError(f"hidden_size={width} does not divide by num_attention_heads={heads}.")
    dim = dim or width // heads
    sizes: dict[str, Any] = {
        "width": width,
        "heads": heads,
        "kv_heads": whole(hf, "num_key_value_heads", None) or heads,
        "head_dim": dim,
    }
    if "rope" not in same:
        same["rope"] = rope_of(hf, dim, theta=theta, rotated=rotated, interleaved=interleaved)
    if "mlp_width" not in same:
        same["mlp_width"] = whole(hf, "intermediate_size")
    if "norm" not in same:
        same["norm"] = Norm(real(hf, "rms_norm_eps", eps))
    if "act" not in same:
        same["act"] = act(hf)
    layer = Layer(**sizes | same)
    found = {
        "vocab": whole(hf, "vocab_size"),
        "layers": tuple(replace(layer, **each(i)) for i in range(n_layers(hf))),
        "norm": layer.norm,
        "tied": flag(hf, "tie_word_embeddings", tied),
        "positions": positions(hf),
    }
    return Config(**found | dict(outer or {}))


def layer_norm(hf: Found, key: str = "layer_norm_eps", *, bias: bool = True) -> Norm:
    return Norm(real(hf, key, 1e-5), centred=True, bias=bias)


def n_layers(hf: Found) -> int:
    return whole(hf, "num_hidden_layers", most=LAYERS)


def biases(hf: Found, *, attention: bool = False, of_attention: frozenset[str] = QKVO) -> frozenset[str]:
    """Those of attention_bias (where the file does not say, as given) and of mlp_bias."""
    none = frozenset[str]()
    own = of_attention if flag(hf, "attention_bias", attention) else none
    return own | (MLP if flag(hf, "mlp_bias", False) else none)


def act(hf: Found, default: str = "silu", key: str = "hidden_act") -> str:
    """The activation that the file names."""
    name = hf.get(key)
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{key}={name!r}: expected the name of an activation.")
    if name is not None and name not in ACTIVATIONS:
        raise NotComputed(key, f"{key}={name!r}: this model computes {', '.join(map(repr, ACTIVATIONS))} only.")
    return name or default


def slides(hf: Found, default: Callable[[int], bool]) -> list[bool]:
    """Which layers see a window only: by layer_types, as transformers 5 writes it, else `default`."""
    n = n_layers(hf)
    kinds = listed(hf, "layer_types", n, ("full_attention", "sliding_attention"))
    return [kind == "sliding_attention" for kind in kinds] if kinds else [default(i) for i in range(n)]


def windows(hf: Found, default: Callable[[int], bool], window: int | None = None) -> Callable[[int], dict[str, Any]]:
    """What each layer sees.

    Args:
      window: where the file names none.
    """
    size, sliding = whole(hf, "sliding_window", window), slides(hf, default)
    if size is None and any(sliding):
        raise ValueError("the config has layer_types with 'sliding_attention' and no sliding_window.")
    return lambda i: {"window": size if sliding[i] else None}


def ignored(hf: Found, *keys: str) -> None:
    """Marks fields that say nothing in this config as read."""
    for key in keys:
        hf.get(key)


def refuse(hf: Found, key: str, *, but: Any = False) -> None:
    """Passes if a field that is not computed has the one value that changes nothing."""
    if hf.get(key) not in (None, but):
        raise NotComputed(key, f"the config has {key}={hf[key]!r}, which this model does not compute.")


def positions(hf: Found) -> int | None:
    """Those that the model is for: where a rope is stretched by a factor, the config has the number before; as vLLM
    counts."""
    trained, rope = (
        whole(hf, "max_position_embeddings", None),
        mapping(hf, "rope_scaling") or mapping(hf, "rope_parameters"),
    )
    kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor")
    if trained is None or factor is None or kind not in ("linear", "dynamic", "yarn"):
        return trained
    return int(factor * ((kind == "yarn" and whole(rope, "original_max_position_embeddings", None)) or trained))

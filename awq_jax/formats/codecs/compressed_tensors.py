"""compressed-tensors' pack-quantized, what llm-compressor writes and vLLM, on TPUs too, reads.

X.weight_packed int32 [N, K b/32], X.weight_scale [N, K/g], X.weight_shape int64 [N, K] and, asymmetric,
X.weight_zero_point int32 [N b/32, K/g]: codes and zero points, less by the middle code there, are the same bits here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from awq_jax.errors import InputError
from awq_jax.formats.codecs.bits import codes, n_words, words
from awq_jax.formats.codecs.codec import Arrays, Codec, Holds, Shape, Specs, groups_of, turned
from awq_jax.formats.codecs.codes import Codes, apart
from awq_jax.formats.codecs.fields import Matches, column, flag, number, pattern, spec
from awq_jax.weights.spec import WHOLE_COLUMN, QuantSpec

FORMAT = "pack-quantized"
PATTERN = "re:"


def encode(w: Codes) -> dict[str, np.ndarray]:
    return {
        "weight_packed": words(turned(w.q), w.spec.bits),
        "weight_scale": turned(w.scale),
        "weight_shape": np.array(w.q.shape[::-1], np.int64),
        **({} if w.spec.symmetric else {"weight_zero_point": turned(words(w.zero, w.spec.bits))}),
        **({} if w.group_of is None else {"weight_g_idx": w.group_of.astype(np.int32)}),
    }


def decode(a: Arrays, spec: QuantSpec) -> Codes:
    scale = turned(a["weight_scale"])
    n, k = map(int, a["weight_shape"])
    if (n, n_words(k, spec.bits)) != a["weight_packed"].shape:
        raise ValueError(f"weight_shape is {[n, k]}, weight_packed {a['weight_packed'].shape} of {spec.bits} bits")
    zero = np.full(scale.shape, spec.middle, np.uint8)
    if "weight_zero_point" in a:
        zero = codes(turned(a["weight_zero_point"]), spec.bits, n)
    q = turned(codes(a["weight_packed"], spec.bits, k))
    return Codes(q, scale, zero, spec, apart(a.get("weight_g_idx"), k, scale.shape[-2]))


def size(shapes: Mapping[str, Shape], spec: QuantSpec) -> Shape:
    n, w = shapes["weight_packed"]
    grouped = spec.group_size != WHOLE_COLUMN and len(shapes["weight_scale"]) == 2
    k = shapes["weight_scale"][1] * spec.group_size if grouped else w * 32 // spec.bits
    return k, n


def shapes(of: Shape, spec: QuantSpec) -> dict[str, Shape]:
    k, n = of
    groups = groups_of(k, spec)
    return {
        "weight_packed": (n, n_words(k, spec.bits)),
        "weight_scale": (n, groups),
        "weight_shape": (2,),
        "weight_zero_point": (n_words(n, spec.bits), groups),
        "weight_g_idx": (k,),
    }


def read_config(found: Mapping[str, Any]) -> Specs:
    """Of groups of modules, which a module's name, a pattern, or else the name of its class puts it into."""
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise InputError(f"quantization_config's config_groups={groups!r}: expected groups of modules.")
    ranked: list[tuple[int, Matches, QuantSpec]] = []
    for name, group in groups.items():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise InputError(f"quantization_config's group {name!r} says nothing of weights.")
        weights = read_spec(name, group["weights"])
        for target in group.get("targets") or ["Linear"]:
            ranked.append((*matcher(str(target)), weights))
    ranked.sort(key=lambda entry: entry[0])
    last = ranked[-1][2]
    return lambda module: next((spec for _, matches, spec in ranked if matches(module)), last)


def matcher(target: str) -> tuple[int, Matches]:
    """How early a target is asked, and whether it means a module; a name of a class means all."""
    if target.startswith(PATTERN):
        return 1, pattern(target.removeprefix(PATTERN))
    if "." in target or target == "lm_head":
        return 0, lambda module: module == target
    return 2, lambda module: True


def read_spec(name: str, weights: Mapping[str, Any]) -> QuantSpec:
    kind, strategy = weights.get("type", "int"), weights.get("strategy")
    group_size = column(weights.get("group_size"))
    strategy = strategy or ("channel" if group_size == WHOLE_COLUMN else "group")
    if kind != "int" or strategy not in ("group", "channel"):
        raise InputError(
            f"quantization_config's group {name!r} has {kind} by {strategy}: int by group or channel is read."
        )
    given = {"group_size": WHOLE_COLUMN if strategy == "channel" else group_size}
    return spec(number(weights, 4, "num_bits"), number(given, 128, "group_size"), flag(weights, "symmetric", True))


def about(specs: Mapping[str, QuantSpec], dense: Sequence[str], default: QuantSpec) -> dict[str, Any]:
    """Every kind of weight is a group; the most frequent has the class for its target, the others names."""
    kinds: dict[QuantSpec, list[str]] = {}
    for name, one in (specs or {"": default}).items():
        kinds.setdefault(one, []).append(name)
    ranked = sorted(kinds, key=lambda one: -len(kinds[one]))
    exact = lambda name: f"{PATTERN}^{re.escape(name)}$"
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if i == 0 else [exact(name) for name in kinds[one]],
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
            "weights": arguments(one),
        }
        for i, one in enumerate(ranked)
    }
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": FORMAT,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": list(dict.fromkeys([*([] if "lm_head" in specs else ["lm_head"]), *dense])),
            "config_groups": groups,
        }
    }


def arguments(one: QuantSpec) -> dict[str, Any]:
    """A QuantSpec as compressed-tensors' QuantizationArgs, which allow no other fields."""
    whole = one.group_size == WHOLE_COLUMN
    return {
        "num_bits": one.bits,
        "type": "int",
        "symmetric": one.symmetric,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else one.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


COMPRESSED_TENSORS = Codec(
    name="compressed-tensors",
    title="compressed-tensors",
    methods=[("compressed-tensors", FORMAT)],
    parts={
        "weight_packed": np.int32,
        "weight_scale": np.floating,
        "weight_shape": np.integer,
        "weight_zero_point": np.int32,
        "weight_g_idx": np.integer,
    },
    optional=("weight_g_idx",),
    if_asymmetric=("weight_zero_point",),
    holds=Holds(bits=range(2, 9), whole_words=False, act_order=True),
    size=size,
    shapes=shapes,
    encode=encode,
    decode=decode,
    read_config=read_config,
    about=about,
)

"""GPTQ's layout: X.qweight int32 [K b/32, N], X.qzeros int32 [K/g, N b/32], X.scales [K/g, N], X.g_idx int32 [K].

Row k is in group g_idx[k]. Version 2 stores zero points as they are; version 1 less by one, in the arithmetic of words
(a zero point of 0 borrows from the next one), about which its readers differ: it is written for symmetric weights only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from awq_jax.formats.codecs.bits import codes, n_words, words
from awq_jax.formats.codecs.codec import Arrays, Codec, Holds, Shape, Specs, groups_of, turned, usual
from awq_jax.formats.codecs.codes import Codes, apart
from awq_jax.formats.codecs.fields import by_module, flag, number, pattern, spec
from awq_jax.weights.spec import QuantSpec


def encode(w: Codes) -> dict[str, np.ndarray]:
    k = w.q.shape[-2]
    rows = np.arange(k) // (k // w.scale.shape[-2]) if w.group_of is None else w.group_of
    return {
        "qweight": turned(words(turned(w.q), w.spec.bits)),
        "qzeros": words(w.zero, w.spec.bits),
        "scales": w.scale,
        "g_idx": rows.astype(np.int32),
    }


def decode(a: Arrays, spec: QuantSpec) -> Codes:
    q, scale = turned(codes(turned(a["qweight"]), spec.bits)), a["scales"]
    zero = codes(a["qzeros"], spec.bits, scale.shape[-1])
    return Codes(q, scale, zero, spec, apart(a.get("g_idx"), q.shape[-2], scale.shape[-2]))


def less_one(w: Codes) -> dict[str, np.ndarray]:
    a = encode(w)
    return a | {"qzeros": (a["qzeros"].view("<u4") - ones(w.zero.shape[-1], w.spec.bits)).view("<i4")}


def plus_one(a: Arrays, spec: QuantSpec) -> Codes:
    zeros = np.ascontiguousarray(a["qzeros"]).view("<u4") + ones(a["scales"].shape[-1], spec.bits)
    return decode({**a, "qzeros": zeros.view("<i4")}, spec)


def ones(n: int, bits: int) -> np.ndarray:
    """What differs between the words of the two versions."""
    return words(np.ones(n, np.uint8), bits).view("<u4")


def size(shapes: Mapping[str, Shape], spec: QuantSpec) -> Shape:
    *lead, k, n = shapes["qweight"]
    return (*lead, k * 32 // spec.bits, n)


def shapes(of: Shape, spec: QuantSpec) -> dict[str, Shape]:
    *lead, k, n = of
    groups = groups_of(k, spec)
    return {
        "qweight": (*lead, n_words(k, spec.bits), n),
        "qzeros": (*lead, groups, n_words(n, spec.bits)),
        "scales": (*lead, groups, n),
        "g_idx": (k,),
    }


def read_config(found: Mapping[str, Any]) -> Specs:
    """Of GPTQModel's `dynamic`, which has patterns of modules that differ, and of auto-round's `extra_config`."""
    patterns, names = found.get("dynamic") or {}, found.get("extra_config") or {}
    changes = [
        (pattern(key.removeprefix("+:")), fields) for key, fields in patterns.items() if not key.startswith("-:")
    ]
    changes += [(lambda module, key=key: module == key, fields) for key, fields in names.items()]
    dense = lambda fields: isinstance(fields, Mapping) and fields.get("bits") in (16, 32)
    return by_module(found, [(matches, fields) for matches, fields in changes if not dense(fields)], read_spec)


def read_spec(found: Mapping[str, Any]) -> QuantSpec:
    return spec(number(found, 4, "bits"), number(found, 128, "group_size"), flag(found, "sym", False))


def about(specs: Mapping[str, QuantSpec], dense: Sequence[str], default: QuantSpec, version: str) -> dict[str, Any]:
    most, others = usual(specs, default)
    changes: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in dense}
    changes |= {f"+:^{re.escape(name)}$": fields_of(spec) for name, spec in others.items()}
    return {
        "quantization_config": {
            "quant_method": "gptq",
            **fields_of(most),
            "desc_act": False,
            "lm_head": "lm_head" in specs,
            "checkpoint_format": version,
            **({"dynamic": changes} if changes else {}),
        }
    }


def fields_of(spec: QuantSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": spec.group_size, "sym": spec.symmetric}


GPTQ_V2 = Codec(
    name="gptq_v2",
    title="GPTQ",
    methods=[("gptq", "gptq_v2"), ("auto-round", "auto_round"), ("auto-round", "auto_round:gptqmodel")],
    parts={"qweight": np.int32, "qzeros": np.int32, "scales": np.floating, "g_idx": np.int32},
    optional=("g_idx",),
    if_asymmetric=(),
    holds=Holds(bits=(2, 3, 4, 8), act_order=True),
    size=size,
    shapes=shapes,
    encode=encode,
    decode=decode,
    read_config=read_config,
    about=lambda specs, dense, default: about(specs, dense, default, "gptq_v2"),
)
GPTQ = replace(
    GPTQ_V2,
    name="gptq",
    methods=[("gptq", "gptq"), ("auto-round", "auto_round:auto_gptq")],
    holds=replace(GPTQ_V2.holds, asymmetric=False),
    encode=less_one,
    decode=plus_one,
    about=lambda specs, dense, default: about(specs, dense, default, "gptq"),
)

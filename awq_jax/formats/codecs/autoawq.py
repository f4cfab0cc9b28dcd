"""AutoAWQ's gemm layout, which vLLM, SGLang, TGI, LMDeploy, mlx-lm and transformers load.

A linear X of K inputs and N outputs is X.qweight int32 [K, N/8], X.qzeros int32 [K/g, N/8] and X.scales float16
[K/g, N]; w = (q - z) * s. Nibble i of a word holds column ORDER[i] of its eight (AutoAWQ awq/modules/linear/gemm.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from awq_jax.errors import InputError
from awq_jax.formats.codecs.bits import codes, words
from awq_jax.formats.codecs.codec import Arrays, Codec, Holds, Shape, Specs, groups_of
from awq_jax.formats.codecs.codes import Codes
from awq_jax.formats.codecs.fields import flag, number, spec
from awq_jax.weights.spec import QuantSpec

BITS = 4
PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
REVERSE = (0, 4, 1, 5, 2, 6, 3, 7)
HEAD = "lm_head"
OTHERWISE = ("dynamic", "extra_config")
"""Fields that give modules a width or group size of their own."""


def pack_gemm(q: UInt8[np.ndarray, "*k n"]) -> Int32[np.ndarray, "*k words"]:
    """Codes 0 .. 15 in AutoAWQ's words, eight columns a word; n is a multiple of 8.

    Example:
      >>> hex(pack_gemm(np.arange(8, dtype=np.uint8)[None])[0, 0])
      '0x75316420'
    """
    return words(q.reshape(*q.shape[:-1], -1, PER_WORD)[..., ORDER].reshape(q.shape), BITS)


def unpack_gemm(packed: Int32[np.ndarray, "*k words"]) -> UInt8[np.ndarray, "*k n"]:
    """The codes that `pack_gemm` stored."""
    q = codes(packed, BITS)
    return q.reshape(*q.shape[:-1], -1, PER_WORD)[..., REVERSE].reshape(q.shape)


def encode(w: Codes) -> dict[str, np.ndarray]:
    return {"qweight": pack_gemm(w.q), "qzeros": pack_gemm(w.zero), "scales": w.scale}


def decode(a: Arrays, spec: QuantSpec) -> Codes:
    zero = unpack_gemm(a["qzeros"]) if "qzeros" in a else np.full(a["scales"].shape, spec.middle, np.uint8)
    return Codes(unpack_gemm(a["qweight"]), a["scales"], zero, spec)


def size(shapes: Mapping[str, Shape], spec: QuantSpec) -> Shape:
    *lead, k, n = shapes["qweight"]
    return (*lead, k, n * PER_WORD)


def shapes(of: Shape, spec: QuantSpec) -> dict[str, Shape]:
    *lead, k, n = of
    groups = groups_of(k, spec)
    return {
        "qweight": (*lead, k, n // PER_WORD),
        "qzeros": (*lead, groups, n // PER_WORD),
        "scales": (*lead, groups, n),
    }


def read_config(found: Mapping[str, Any]) -> Specs:
    """One spec for all, symmetric if there are no zero points, which are 8 then; refuses modules that differ."""
    for key in OTHERWISE:
        if module := next(iter(changed(found.get(key))), None):
            raise InputError(
                f"quantization_config has {key} with settings of its own for {module!r}: modules that differ are not "
                "read from AutoAWQ files. Start from the dense model."
            )
    bits, group_size = number(found, BITS, "bits", "w_bit"), number(found, 128, "group_size", "q_group_size")
    one = spec(bits, group_size, not flag(found, "zero_point", True))
    return lambda module: one


def changed(modules: Any) -> list[str]:
    """The names or patterns of modules with other settings; those with "-:" before them or 16 bits are dense."""
    if not isinstance(modules, dict):
        return [] if modules is None else [str(modules)]
    dense = lambda changes: isinstance(changes, dict) and changes.get("bits") in (16, 32)
    return [name for name, changes in modules.items() if not (name.startswith("-:") or dense(changes))]


def about(specs: Mapping[str, QuantSpec], dense: Sequence[str], default: QuantSpec) -> dict[str, Any]:
    """zero_point is always true: vLLM's fast kernel refuses files without, so symmetric weights store theirs.

    vLLM leaves dense what contains one of the names in modules_to_not_convert.
    """
    return {
        "quantization_config": {
            "quant_method": "awq",
            "zero_point": True,
            "group_size": default.group_size,
            "bits": default.bits,
            "version": "gemm",
            "modules_to_not_convert": list(dict.fromkeys([HEAD, *dense])),
        }
    }


AUTOAWQ = Codec(
    name="awq",
    title="AutoAWQ",
    methods=[("awq", "gemm"), ("auto-round", "auto_round:auto_awq")],
    parts={"qweight": np.int32, "qzeros": np.int32, "scales": np.floating},
    optional=(),
    if_asymmetric=("qzeros",),
    holds=Holds(bits=(BITS,), mixed=False, head=False),
    size=size,
    shapes=shapes,
    encode=encode,
    decode=decode,
    read_config=read_config,
    about=about,
)

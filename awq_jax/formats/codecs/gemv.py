"""Other layouts of 4-bit AWQ, read only: AutoAWQ's gemv and gemv_fast, and llm-awq's, which is gemv_fast's.

gemv: X.qweight int32 [N, K/8] in plain order, X.qzeros int32 [N, z], X.scales [N, 8 z]. gemv_fast: X.qweight int16
[N/4, K], in blocks of 4 outputs and 64 inputs, X.scales [8 z, N] and X.qzeros (llm-awq: X.scaled_zeros) = -z * s.
Groups are filled up to 8 z with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Int16, UInt8

from awq_jax.errors import InputError
from awq_jax.formats.codecs.autoawq import AUTOAWQ, BITS, PER_WORD
from awq_jax.formats.codecs.bits import codes, words
from awq_jax.formats.codecs.codec import Arrays, Codec, Shape, groups_of, turned
from awq_jax.formats.codecs.codes import Codes
from awq_jax.formats.codecs.mlx import minus_steps, zero_of
from awq_jax.weights.spec import QuantSpec

BLOCK = (4, 4, 2, 8)
"""Of gemv_fast: outputs, codes of a word, halves of a block of 64 inputs, words one after the other."""


def zeros_width(k: int, spec: QuantSpec) -> int:
    """Words of 8 zero points that groups are filled up to (AutoAWQ awq/modules/linear/gemv.py)."""
    together = {64: 2, 32: 4}.get(spec.group(k), 1)
    return math.ceil(groups_of(k, spec) / (PER_WORD * together)) * together


def filled(of_groups: np.ndarray, spec: QuantSpec, k: int) -> np.ndarray:
    """Numbers of groups, filled up with zeros."""
    return np.pad(of_groups, [(0, PER_WORD * zeros_width(k, spec) - len(of_groups)), (0, 0)])


def encode_gemv(w: Codes) -> dict[str, np.ndarray]:
    fill = lambda a: turned(filled(a, w.spec, len(w.q)))
    return {"qweight": words(turned(w.q), BITS), "qzeros": words(fill(w.zero), BITS), "scales": fill(w.scale)}


def decode_gemv(a: Arrays, spec: QuantSpec) -> Codes:
    q = turned(codes(a["qweight"], BITS))
    groups = groups_of(len(q), spec)
    return Codes(q, turned(a["scales"])[:groups], turned(codes(a["qzeros"], BITS))[:groups], spec)


def gemv_size(shapes: Mapping[str, Shape], spec: QuantSpec) -> Shape:
    n, w = shapes["qweight"]
    return w * PER_WORD, n


def gemv_shapes(of: Shape, spec: QuantSpec) -> dict[str, Shape]:
    (k, n), z = of, zeros_width(of[0], spec)
    return {"qweight": (n, k // PER_WORD), "qzeros": (n, z), "scales": (n, PER_WORD * z)}


def pack_fast(q: UInt8[np.ndarray, "n k"]) -> Int16[np.ndarray, "n_4 k"]:
    """Codes in blocks: word 16 i + 8 h + u of block b of rows 4 r holds codes [4 r + i, 64 b + 32 h + 8 n + u]."""
    n, _ = q.shape
    outputs, in_word, halves, run = BLOCK
    blocks = q.reshape(n // outputs, outputs, -1, halves, in_word, run).transpose(0, 2, 1, 3, 5, 4)
    return words(blocks.reshape(n // outputs, -1), BITS).view("<i2")


def unpack_fast(packed: Int16[np.ndarray, "n_4 k"]) -> UInt8[np.ndarray, "n k"]:
    """The codes that `pack_fast` stored."""
    rows, k = packed.shape
    outputs, in_word, halves, run = BLOCK
    flat = codes(np.ascontiguousarray(packed).view("<i4"), BITS)
    blocks = flat.reshape(rows, -1, outputs, halves, run, in_word).transpose(0, 2, 1, 3, 5, 4)
    return blocks.reshape(rows * outputs, k)


def fast(name: str, zeros: str, methods: Sequence[tuple[str, str]]) -> Codec:
    """gemv_fast, whose zero points are called `zeros`."""

    def encode(w: Codes) -> dict[str, np.ndarray]:
        fill = lambda a: filled(a, w.spec, len(w.q))
        return {
            "qweight": pack_fast(turned(w.q)),
            zeros: fill(minus_steps(w.zero, w.scale)),
            "scales": fill(w.scale),
        }

    def decode(a: Arrays, spec: QuantSpec) -> Codes:
        q = turned(unpack_fast(a["qweight"]))
        groups = groups_of(len(q), spec)
        scale = a["scales"][:groups]
        return Codes(q, scale, zero_of(a[zeros][:groups], scale, spec), spec)

    def size(shapes: Mapping[str, Shape], spec: QuantSpec) -> Shape:
        rows, k = shapes["qweight"]
        return k, rows * BLOCK[0]

    def shapes(of: Shape, spec: QuantSpec) -> dict[str, Shape]:
        (k, n), z = of, zeros_width(of[0], spec)
        return {"qweight": (n // BLOCK[0], k), zeros: (PER_WORD * z, n), "scales": (PER_WORD * z, n)}

    return replace(
        AUTOAWQ,
        name=name,
        title=f"AWQ {name}",
        methods=methods,
        parts={"qweight": np.int16, zeros: np.floating, "scales": np.floating},
        if_asymmetric=(),
        holds=replace(AUTOAWQ.holds, float_zeros=True),
        size=size,
        shapes=shapes,
        encode=encode,
        decode=decode,
        about=not_written,
    )


def not_written(specs: Mapping[str, QuantSpec], dense: Sequence[str], default: QuantSpec) -> dict[str, Any]:
    raise InputError("Layouts for gemv are read only: write format='awq', which all their readers take.")


GEMV = replace(
    AUTOAWQ,
    name="gemv",
    title="AWQ gemv",
    methods=[("awq", "gemv")],
    size=gemv_size,
    shapes=gemv_shapes,
    encode=encode_gemv,
    decode=decode_gemv,
    about=not_written,
)
GEMV_FAST = fast("gemv_fast", "qzeros", [("awq", "gemv_fast")])
LLM_AWQ = fast("llm-awq", "scaled_zeros", [("awq", "llm-awq")])

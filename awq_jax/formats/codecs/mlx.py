"""MLX's affine layout: X.weight uint32 [N, K b/32], X.scales and X.biases [N, K/g], w = q * s + b, hence b = -z * s.

MLX chooses any b, so that z need be no whole number; of whole ones b is rounded to the dtype of s, and gives z back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from awq_jax.errors import InputError
from awq_jax.formats.codecs.bits import codes, n_words, words
from awq_jax.formats.codecs.codec import Arrays, Codec, Holds, Shape, Specs, groups_of, turned, usual
from awq_jax.formats.codecs.codes import Codes, whole_or_float
from awq_jax.formats.codecs.fields import by_module, number, spec
from awq_jax.weights.spec import QuantSpec

GROUPS = (32, 64, 128)


def encode(w: Codes) -> dict[str, np.ndarray]:
    return {
        "weight": words(turned(w.q), w.spec.bits).view("<u4"),
        "scales": turned(w.scale),
        "biases": turned(minus_steps(w.zero, w.scale)),
    }


def decode(a: Arrays, spec: QuantSpec) -> Codes:
    scale = turned(a["scales"])
    q = turned(codes(np.ascontiguousarray(a["weight"]).view("<i4"), spec.bits))
    return Codes(q, scale, zero_of(turned(a["biases"]), scale, spec), spec)


def minus_steps(zero: np.ndarray, scale: Float[np.ndarray, "*g"]) -> Float[np.ndarray, "*g"]:
    """-z * s, in the dtype of s."""
    return (-(zero.astype(np.float32) * scale.astype(np.float32))).astype(scale.dtype)


def zero_of(biases: Float[np.ndarray, "*g"], scale: Float[np.ndarray, "*g"], spec: QuantSpec) -> np.ndarray:
    """The zero points of which `minus_steps` gives `biases`."""
    wide = scale.astype(np.float32)
    zero = -biases.astype(np.float32) / np.where(wide == 0, 1, wide)
    return whole_or_float(zero, spec.levels, biases, lambda z: minus_steps(z, scale))


def size(shapes: Mapping[str, Shape], spec: QuantSpec) -> Shape:
    *lead, n, w = shapes["weight"]
    return (*lead, w * 32 // spec.bits, n)


def shapes(of: Shape, spec: QuantSpec) -> dict[str, Shape]:
    *lead, k, n = of
    groups = groups_of(k, spec)
    return {"weight": (*lead, n, n_words(k, spec.bits)), "scales": (*lead, n, groups), "biases": (*lead, n, groups)}


def read_config(found: Mapping[str, Any]) -> Specs:
    """Modules that differ stand under their names beside the usual fields, false if they are dense."""
    changes = [(lambda module, name=name: module == name, fields) for name, fields in found.items()]
    for name, fields in found.items():
        if isinstance(fields, Mapping) and fields.get("mode", "affine") != "affine":
            raise InputError(f"quantization_config's mode={fields['mode']!r} of {name}: only affine is read.")
    return by_module(found, changes, lambda f: spec(number(f, 4, "bits"), number(f, 64, "group_size"), False))


def about(specs: Mapping[str, QuantSpec], dense: Sequence[str], default: QuantSpec) -> dict[str, Any]:
    """Under both names that mlx-lm looks at; what has no scales in the file is dense."""
    most, others = usual(specs, default)
    fields = lambda one: {"group_size": one.group_size, "bits": one.bits, "mode": "affine"}
    said = {**fields(most), **{name: fields(one) for name, one in others.items()}}
    return {"quantization": said, "quantization_config": said}


MLX = Codec(
    name="mlx",
    title="MLX",
    methods=[("MLX", "affine")],
    parts={"scales": np.floating, "biases": np.floating, "weight": np.uint32},
    optional=(),
    if_asymmetric=(),
    holds=Holds(bits=(2, 3, 4, 5, 6, 8), groups=GROUPS, whole_words=False, float_zeros=True, stacks=True),
    size=size,
    shapes=shapes,
    encode=encode,
    decode=decode,
    read_config=read_config,
    about=about,
)

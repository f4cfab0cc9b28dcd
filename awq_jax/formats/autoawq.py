"""AutoAWQ's gemm layout, which vLLM, SGLang, TGI, LMDeploy, mlx-lm and transformers load.

A linear X of K inputs and N outputs is X.qweight int32 [K, N/8], X.qzeros int32 [K/g, N/8] and X.scales float16
[K/g, N]; w = (q - z) * s. Nibble i of a word holds column ORDER[i] of its eight (AutoAWQ awq/modules/linear/gemm.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int32, Shaped, UInt8

import awq_jax.kernels as kernels
from awq_jax.errors import InputError
from awq_jax.formats.huggingface import Source, write_about
from awq_jax.formats.shard_writer import ShardWriter
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import QuantizedTensor, in_rows

BITS = 4
PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
REVERSE = (0, 4, 1, 5, 2, 6, 3, 7)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def pack_gemm(codes: UInt8[np.ndarray, "k n"]) -> Int32[np.ndarray, "k words"]:
    """Codes 0 .. 15 in AutoAWQ's words, eight columns a word; n is a multiple of 8.

    Example:
      >>> hex(pack_gemm(np.arange(8, dtype=np.uint8)[None])[0, 0])
      '0x75316420'
    """
    k, n = codes.shape
    nibbles = codes.reshape(k, n // PER_WORD, PER_WORD)[..., ORDER]
    return np.ascontiguousarray(nibbles[..., 0::2] | nibbles[..., 1::2] << 4).view("<i4")[..., 0]


def unpack_gemm(words: Int32[np.ndarray, "k words"]) -> UInt8[np.ndarray, "k n"]:
    """The codes that `pack_gemm` stored."""
    k, count = words.shape
    pairs = np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(k, count, 4)
    nibbles = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(k, count, PER_WORD)
    return nibbles[..., REVERSE].reshape(k, count * PER_WORD)


def to_autoawq(w: QuantizedTensor, name: str = "the weight") -> dict[str, np.ndarray]:
    """qweight, qzeros and scales of a weight of shape [K, N]; a symmetric one gets its zero point, 8, written out.

    Args:
      name: for the errors.

    Raises:
      InputError: an input scale, or what check_fits refuses.
    """
    if len(w.matrix_shape) != 2:
        raise InputError(f"{name}: shape {w.matrix_shape}, AutoAWQ files hold matrices: write one expert at a time.")
    check_fits(name, *w.matrix_shape, w.spec)
    if w.input_scale is not None:
        raise InputError(f"{name} has an input scale, which AutoAWQ files cannot hold: quantize with scales='folded'.")
    scales = np.asarray(w.scales)
    codes = kernels.unpack(jnp.asarray(in_rows(w).codes), BITS)
    zeros = np.full(scales.shape, w.spec.middle, np.uint8) if w.zeros is None else np.asarray(w.zeros)
    return {
        "qweight": pack_gemm(np.asarray(codes)),
        "qzeros": pack_gemm(zeros),
        "scales": as_float16(f"{name}, its steps", scales, axis=0),
    }


def from_autoawq(
    qweight: Int32[np.ndarray, "k words"],
    qzeros: Int32[np.ndarray, "groups words"] | None,
    scales: Float[np.ndarray, "groups n"],
    group_size: int,
    dtype: Any,
) -> QuantizedTensor:
    """The weight [K, N] of AutoAWQ's three arrays, to the bit; its leaves are numpy arrays.

    Args:
      qzeros: None for a symmetric weight, whose zero point is 8.
      group_size: as in config.json, -1 for one group a column.
      dtype: that the dense weight has.

    Raises:
      ValueError: a group size that QuantSpec does not know, or arrays that do not fit each other.
    """
    spec = QuantSpec(BITS, group_size, symmetric=qzeros is None)
    for name, words in (("qweight", qweight), ("qzeros", qzeros)):
        if words is not None and words.dtype != np.int32:
            raise ValueError(f"{name} is {words.dtype}, not int32.")
    if not jnp.issubdtype(scales.dtype, jnp.floating):
        raise ValueError(f"scales are {scales.dtype}, not floating point.")
    k, n = qweight.shape[0], qweight.shape[1] * PER_WORD
    groups = k // spec.group(k)
    zeros_shape = (groups, n // PER_WORD) if qzeros is None else qzeros.shape
    if spec.padding(k) or scales.shape != (groups, n) or zeros_shape != (groups, n // PER_WORD):
        raise ValueError(
            f"qweight {qweight.shape}, qzeros {zeros_shape} and scales {scales.shape} do not fit each other in groups "
            f"of {group_size}: scales should be {(groups, n)}."
        )
    leaves: dict[str, Any] = {
        "codes": np.asarray(kernels.pack(jnp.asarray(unpack_gemm(qweight)), BITS)),
        "scales": np.asarray(scales),
        "zeros": None if qzeros is None else unpack_gemm(qzeros),
        "input_scale": None,
    }
    return QuantizedTensor(**leaves, spec=spec, dtype=np.dtype(dtype))


def check_fits(name: str, in_features: int, out_features: int, spec: QuantSpec) -> None:
    """Passes if an AutoAWQ file can hold this linear; ask before any work starts.

    Raises:
      InputError: it cannot, and what to do.
    """
    otherwise = "leave the site dense (skip=True in a rule), or write format='orbax', which holds anything"
    if spec.bits != BITS:
        raise InputError(f"{name}: AutoAWQ files hold 4 bits, not {spec.bits}: use bits=4, or {otherwise}.")
    if spec.padding(in_features):
        fits = [g for g in (128, 64, 32) if in_features % g == 0]
        remedy = f"use group_size={fits[0]}, " if fits else ""
        raise InputError(
            f"{name}: {in_features} input features do not divide by {spec.group(in_features)}, the group size, as "
            f"AutoAWQ files need: {remedy}{otherwise}."
        )
    if out_features % PER_WORD:
        raise InputError(
            f"{name}: {out_features} output features do not divide by {PER_WORD}, as AutoAWQ files need: {otherwise}."
        )


def quantization_config(spec: QuantSpec, skipped: Sequence[str] = ()) -> dict[str, Any]:
    """What config.json says of the quantization.

    zero_point is always true: vLLM's fast kernel refuses files without zero points, so symmetric weights store theirs.

    Args:
      skipped: modules that stay dense, by full name; vLLM skips what contains one of them.
    """
    return {
        "quant_method": "awq",
        "zero_point": True,
        "group_size": spec.group_size,
        "bits": spec.bits,
        "version": "gemm",
        "modules_to_not_convert": list(dict.fromkeys([HEAD, *skipped])),
    }


def as_float16(name: str, w: Float[np.ndarray, "*shape"], axis: int | None = None) -> Float16[np.ndarray, "*shape"]:
    """`w` in float16.

    Args:
      axis: along which values are held against their largest; None for all, beside which a token that was never
        trained is nothing.

    Raises:
      InputError: a value that float16 cannot hold, or so small values that it would hold little of them.
    """
    if w.dtype == np.float16:
        return w
    with np.errstate(over="ignore"):
        half = w.astype(np.float16)
    if not np.isfinite(half).all():
        largest = float(np.abs(w.astype(np.float32)).max())
        raise InputError(
            f"{name}: a value of {largest:g} does not fit float16, which AutoAWQ files use (up to 65504): write "
            "format='orbax'."
        )
    wide = np.asarray(w, np.float32)
    largest, lost = (np.abs(a).max(axis, initial=0) for a in (wide, half - wide))
    if (odd := lost > 2**-7 * largest).any():
        raise InputError(
            f"{name}: values of at most {largest[odd].max():g} are too small for float16, which AutoAWQ files use "
            "(exact from 6e-5): write format='orbax'."
        )
    return half


class OneWidth(Protocol):
    """The bits and group size of all weights; a Recipe or a QuantSpec."""

    @property
    def bits(self) -> int: ...

    @property
    def group_size(self) -> int: ...


class Writer:
    """Writes a model to a folder, one part a call, so no more than a part of it is ever in memory.

    Example:
      >>> with written_whole("out") as folder:
      ...     writer = Writer(folder, checkpoint, recipe)
      ...     writer.write("outer", {"model.embed_tokens.weight": embedding, "model.norm.weight": norm})
      ...     writer.write("layers_0", {"model.layers.0.self_attn.q_proj.weight": quantized})
      ...     writer.finish()

    Args:
      folder: exists and is empty.
      source: the dense model, usually a Checkpoint: its config.json, tokenizer and generation_config.json go along.
      recipe: bits and group size; a file has one of each for the whole model.
      unconverted: names that stand in modules_to_not_convert beside those of the dense matrices.
    """

    def __init__(self, folder: Path, source: Source, recipe: OneWidth, unconverted: Sequence[str] = ()) -> None:
        self.folder, self.source = Path(folder), source
        self.spec = QuantSpec(recipe.bits, recipe.group_size)
        self.shards = ShardWriter(self.folder)
        self.dense: list[str] = []
        self.unconverted = unconverted

    def write(self, part: str, tensors: Mapping[str, Shaped[Array, "*shape"] | QuantizedTensor]) -> None:
        """Writes a part, which stays in one file.

        Args:
          part: what it is, for the errors.
          tensors: by Hugging Face name; arrays in Hugging Face orientation ([out, in]), quantized weights [in, out].

        Raises:
          InputError: something that AutoAWQ files cannot hold, see to_autoawq; a value beyond float16.
        """
        arrays: dict[str, np.ndarray] = {}
        for name, tensor in tensors.items():
            arrays |= self._arrays(f"{part}: {name}", name, tensor)
        self.shards.add(arrays)

    def finish(self, dtype: str = "float16") -> None:
        """Writes the index, config.json and what comes from the source; without them the folder is no model.

        Args:
          dtype: in which readers are to compute: "bfloat16" where activations are too large for float16. The tensors
            are float16 in any case; readers convert them.
        """
        self.shards.finish()
        quantization = quantization_config(self.spec, [*self.dense, *self.unconverted])
        write_about(self.folder, self.source, torch_dtype=dtype, dtype=dtype, quantization_config=quantization)

    def _arrays(self, where: str, name: str, tensor: Any) -> dict[str, np.ndarray]:
        module = name.removesuffix(".weight")
        if not isinstance(tensor, QuantizedTensor):
            array = np.asarray(tensor)
            if array.ndim == 2 and module != EMBEDDING:
                self.dense.append(module)
            array = as_float16(where, array) if jnp.issubdtype(array.dtype, jnp.floating) else array
            return {name: np.asarray(array, order="C")}
        found, wanted = (tensor.spec.bits, tensor.spec.group_size), (self.spec.bits, self.spec.group_size)
        if found != wanted:
            raise InputError(
                f"{where}: (bits, group size) is {found} and {wanted} elsewhere, but an AutoAWQ file has one of each: "
                "drop the rule that changes them, or write format='orbax'."
            )
        if module == HEAD:
            raise InputError(f"{where}: readers of AutoAWQ files expect a dense lm_head: exclude it with a rule.")
        return {f"{module}.{key}": value for key, value in to_autoawq(tensor, where).items()}

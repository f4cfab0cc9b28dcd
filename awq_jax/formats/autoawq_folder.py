"""Folders in AutoAWQ's format, read under the names that the dense tensors had."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from awq_jax.formats.autoawq import BITS, PER_WORD, from_autoawq
from awq_jax.formats.errors import InputError
from awq_jax.formats.huggingface import read_json
from awq_jax.formats.stored import StoredTensor
from awq_jax.spec import QuantSpec
from awq_jax.tensor import QuantizedTensor

OLD_CONFIG = "quant_config.json"


def read_spec(folder: Path, config: Mapping[str, Any]) -> QuantSpec | None:
    """How an AutoAWQ folder is quantized, None for a dense one; from config.json, or the file that old ones carry.

    Raises:
      InputError: the folder is quantized in another way.
    """
    found = config.get("quantization_config")
    if found is None and (folder / OLD_CONFIG).exists():
        old = read_json(folder / OLD_CONFIG)
        found = {"quant_method": "awq", "bits": old.get("w_bit"), "group_size": old.get("q_group_size"), **old}
    if found is None:
        return None
    method, bits = found.get("quant_method"), found.get("bits", BITS)
    layout = str(found.get("version") or found.get("checkpoint_format") or found.get("format") or "gemm").lower()
    if method != "awq" or bits != BITS or layout != "gemm":
        raise InputError(
            f"{folder} is quantized already, by {method!r} in {bits} bits and layout {layout!r}: of quantized models "
            "only AutoAWQ's 4 bits gemm is read. Start from the dense model."
        )
    try:
        return QuantSpec(bits, found.get("group_size", 128))
    except (ValueError, TypeError) as e:
        raise InputError(f"{folder}: its quantization_config is not read: {e}") from e


def quantized_tensors(folder: Path, stored: Mapping[str, StoredTensor], spec: QuantSpec) -> dict[str, StoredTensor]:
    """The tensors of an AutoAWQ folder under the names that the dense ones had: X.qweight and its two as X.weight.

    Raises:
      InputError: one of the three is missing, their shapes do not fit, or the dense tensor is there too.
    """
    parts = (".qweight", ".qzeros", ".scales")
    modules = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    theirs = {module + part for module in modules for part in parts}
    tensors = {name: tensor for name, tensor in stored.items() if name not in theirs}
    for module in modules:
        if missing := [module + part for part in parts if module + part not in stored]:
            raise InputError(f"{folder} has {module}.qweight but no {missing[0]}: download it again.")
        if f"{module}.weight" in tensors:
            raise InputError(
                f"{folder} has {module} twice, as {module}.weight and quantized: remove the one that is not the model's."
            )
        qweight, qzeros, scales = (stored[module + part] for part in parts)
        tensors[f"{module}.weight"] = quantized_tensor(f"{folder}: {module}", qweight, qzeros, scales, spec)
    return tensors


def quantized_tensor(
    where: str, qweight: StoredTensor, qzeros: StoredTensor, scales: StoredTensor, spec: QuantSpec
) -> StoredTensor:
    """The three tensors of a linear as one."""
    k, words = qweight.shape
    groups = k // spec.group(k)
    if spec.padding(k) or scales.shape != (groups, words * PER_WORD) or qzeros.shape != (groups, words):
        raise InputError(
            f"{where}: qweight {qweight.shape}, qzeros {qzeros.shape} and scales {scales.shape} do not fit "
            f"config.json's group_size={spec.group_size}, which needs qzeros {(groups, words)} and scales "
            f"{(groups, words * PER_WORD)}: download config.json and weights again."
        )

    def read() -> QuantizedTensor:
        steps = scales.read()
        return from_autoawq(qweight.read(), qzeros.read(), steps, spec.group_size, steps.dtype)

    nbytes = qweight.nbytes + qzeros.nbytes + scales.nbytes
    stored_as = f"{spec.bits}-bit g{spec.group_size}"
    return StoredTensor((k, words * PER_WORD), nbytes, read, quantized=True, stored_as=stored_as)

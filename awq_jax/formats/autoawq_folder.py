"""Folders in AutoAWQ's format, read under the names that the dense tensors had."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from awq_jax.errors import InputError, reading
from awq_jax.formats.autoawq import BITS, PER_WORD, from_autoawq
from awq_jax.formats.declared import declaration, foreign
from awq_jax.formats.stored import StoredTensor
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import QuantizedTensor

LAYOUTS = ("version", "checkpoint_format", "format")
"""Fields that name the layout; old files leave them out."""
OTHERWISE = ("dynamic", "extra_config")
"""Fields that give modules a width or group size of their own."""


def read_spec(folder: Path, config: Mapping[str, Any]) -> QuantSpec | None:
    """How an AutoAWQ folder is quantized, None for a dense one; from config.json, or the file that old ones carry.

    Symmetric if it has no zero points, which are 8 then.

    Raises:
      InputError: the folder is quantized in another way, or a field cannot be.
    """
    declared = declaration(folder, config)
    if declared is None:
        return None
    tool, found = declared
    if tool != "awq":
        raise foreign(folder, tool, found)
    bits, group_size = (
        number(folder, found, BITS, "bits", "w_bit"),
        number(folder, found, 128, "group_size", "q_group_size"),
    )
    layouts = [str(found[key]).lower() for key in LAYOUTS if found.get(key) is not None]
    if not layouts and found.get("backend") == "llm-awq":
        layouts = ["llm-awq"]
    if bits != BITS or set(layouts) - {"gemm"}:
        raise foreign(folder, tool, found, f" and layout {', '.join(map(repr, layouts))}" if layouts else "")
    for key in OTHERWISE:
        if module := next(iter(changed(found.get(key))), None):
            raise InputError(
                f"{folder}: its quantization_config has {key} with settings of its own for {module!r}: modules that "
                "differ are not read. Start from the dense model."
            )
    zero_point = found.get("zero_point", True)
    if not isinstance(zero_point, bool):
        raise InputError(f"{folder}: its quantization_config's zero_point={zero_point!r}: expected true or false.")
    try:
        return QuantSpec(bits, group_size, symmetric=not zero_point)
    except ValueError as e:
        raise InputError(f"{folder}: its quantization_config's {e}") from e


def number(folder: Path, found: Mapping[str, Any], default: int, *names: str) -> int:
    """The whole number that a field holds, under the first of its names that is there."""
    name, value = next(((n, found[n]) for n in names if n in found), (names[0], default))
    if type(value) is not int:
        raise InputError(f"{folder}: its quantization_config's {name}={value!r}: expected a whole number.")
    return value


def changed(modules: Any) -> list[str]:
    """The names or patterns of modules with other settings; those with "-:" before them or 16 bits are dense."""
    if not isinstance(modules, dict):
        return [] if modules is None else [str(modules)]
    dense = lambda changes: isinstance(changes, dict) and changes.get("bits") in (16, 32)
    return [name for name, changes in modules.items() if not (name.startswith("-:") or dense(changes))]


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
        needed = [part for part in parts if not (part == ".qzeros" and spec.symmetric)]
        if missing := [module + part for part in needed if module + part not in stored]:
            raise InputError(f"{folder} has {module}.qweight but no {missing[0]}: download it again.")
        if f"{module}.weight" in tensors:
            raise InputError(
                f"{folder} has {module} twice, as {module}.weight and quantized: remove the one that is not its own."
            )
        qweight, qzeros, scales = stored[module + parts[0]], stored.get(module + parts[1]), stored[module + parts[2]]
        tensors[f"{module}.weight"] = quantized_tensor(f"{folder}: {module}", qweight, qzeros, scales, spec)
    return tensors


def quantized_tensor(
    where: str, qweight: StoredTensor, qzeros: StoredTensor | None, scales: StoredTensor, spec: QuantSpec
) -> StoredTensor:
    """The tensors of a linear as one."""
    parts = {"qweight": qweight, "scales": scales} | ({"qzeros": qzeros} if qzeros else {})
    k, words = qweight.shape if len(qweight.shape) == 2 else (0, 0)
    groups = k // spec.group(k) if k else 0
    needed = {"qweight": (k, words), "scales": (groups, words * PER_WORD), "qzeros": (groups, words)}
    if not groups or spec.padding(k) or any(part.shape != needed[name] for name, part in parts.items()):
        raise InputError(
            f"{where}: {', '.join(f'{name} {part.shape}' for name, part in parts.items())} do not fit config.json's "
            f"group_size={spec.group_size}, which needs qzeros {needed['qzeros']} and scales {needed['scales']}: "
            "download config.json and weights again."
        )

    def read() -> QuantizedTensor:
        arrays: Any = {"qzeros": None} | {name: part.read() for name, part in parts.items()}
        with reading(f"{where} cannot be read", "download it again"):
            return from_autoawq(**arrays, group_size=spec.group_size, dtype=arrays["scales"].dtype)

    nbytes = sum(part.nbytes for part in parts.values())
    stored_as = f"{spec.bits}-bit g{spec.group_size}"
    return StoredTensor((k, words * PER_WORD), nbytes, read, stored_as, scales.dtype, spec)

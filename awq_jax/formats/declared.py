"""What a folder says of how its weights are quantized, in any tool's words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from awq_jax.errors import InputError
from awq_jax.files import children, inside, read_json

FIELDS = {"quantization_config": None, "compression_config": "compressed-tensors", "quantization": "MLX"}
"""Fields of config.json that say it -> the tool that writes no name of its own there."""
FILES = {"quant_config.json": "awq", "quantize_config.json": "gptq", "hf_quant_config.json": "ModelOpt"}
"""Files beside config.json that say it where config.json does not -> the tool that writes them."""
MARKS = {
    "config_groups": "compressed-tensors",
    "desc_act": "gptq",
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
    "quant_algo": "ModelOpt",
    "w_bit": "awq",
}
"""Fields that only one tool writes -> the tool."""
WIDTHS = ("bits", "w_bit", "num_bits", "nbits")
LAYOUTS = {
    "awq": (("version", "checkpoint_format", "format"), "gemm"),
    "gptq": (("checkpoint_format", "format"), "gptq"),
    "auto-round": (("packing_format",), "auto_round:auto_gptq"),
    "compressed-tensors": (("format",), "pack-quantized"),
    "MLX": (("mode",), "affine"),
}
"""By tool the fields that name a layout, and the layout where none of them is there."""
ACTIVATIONS = "quantized activations"
NOT_WEIGHTS = ("input_activations", "output_activations", "kv_cache_scheme")


def declaration(folder: Path, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(method, the fields that describe it), None for a dense model.

    Raises:
      InputError: something else than fields stands where they should.
    """
    for key, tool in FIELDS.items():
        if (found := config.get(key)) not in (None, {}):
            return method(folder, found, "MLX" if "quantization" in config else tool), found
    for name, tool in FILES.items():
        if file := inside(folder, name):
            found = read_json(file)
            return method(folder, found, tool), found
    return None


def method(folder: Path, found: Any, tool: str | None) -> str:
    """The tool that wrote these fields, by its own name for itself, by what only it writes, or else `tool`."""
    if not isinstance(found, dict):
        raise InputError(f"{folder}: its quantization_config is {found!r}: expected an object, or none if it is dense.")
    if name := found.get("quant_method") or found.get("method"):
        return str(name).lower()
    marked = next((tool for mark, tool in MARKS.items() if mark in found), tool)
    return marked or f"a tool that is not known by its fields {sorted(found)}"


def layouts(tool: str, found: Mapping[str, Any]) -> list[str]:
    """The layouts that are named for the weights; one for those that a codec may read."""
    names, usual = LAYOUTS.get(tool, ((), ""))
    said = [str(found[name]).lower() for name in names if found.get(name) is not None]
    if tool == "awq" and not said and found.get("backend") == "llm-awq":
        said = ["llm-awq"]
    groups = found.get("config_groups")
    if tool == "compressed-tensors" and isinstance(groups, Mapping):
        of_groups = [group for group in groups.values() if isinstance(group, Mapping)]
        said = [str(group["format"]) for group in of_groups if group.get("format")] or said
        said += [ACTIVATIONS for group in of_groups if group.get("input_activations")]
    return list(dict.fromkeys(said)) or [usual]


def foreign(folder: Path, tool: str, found: Mapping[str, Any]) -> InputError:
    """What to say of weights that another tool quantized, or in another layout."""
    bits, said = sorted(set(widths(found))), layouts(tool, found)
    width = f" in {', '.join(map(str, bits))} bits" if bits else ""
    unusual = said if tool in LAYOUTS and said != [LAYOUTS[tool][1]] else []
    layout = f" and layout {', '.join(map(repr, unusual))}" if unusual else ""
    return InputError(
        f"{folder} is quantized already, by {tool}{width}{layout}: of quantized models only those of AutoAWQ (4 bits), "
        "GPTQ, auto-round, compressed-tensors (pack-quantized), MLX (affine) and awq_jax are read. Start from the "
        "dense model, or let that tool make this one dense."
    )


def widths(node: Any) -> Iterator[Any]:
    """All bits of weights that are named at any depth."""
    if isinstance(node, dict):
        yield from (node[key] for key in WIDTHS if type(node.get(key)) is int)
        yield from (int(key[8]) for key in ("load_in_4bit", "load_in_8bit") if node.get(key) is True)
        node = {key: child for key, child in node.items() if key not in NOT_WEIGHTS}
    for child in children(node):
        yield from widths(child)

"""What vLLM and SGLang ask of a quantized folder, as far as a test can: headers and config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
MAIN = {"awq": "qweight", "gptq": "qweight", "compressed-tensors": "weight_packed"}


def refusals(folder: Path) -> list[str]:
    """Why a server would not load the folder, or compute something else; empty if it would."""
    config = json.loads((folder / "config.json").read_text())
    said = config["quantization_config"]
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            shapes |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    method = said["quant_method"]
    ends = f".{MAIN[method]}"
    quantized = {name.removesuffix(ends) for name in shapes if name.endswith(ends)}
    dense = {
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith("_proj.weight") and len(shape) == 2
    }
    found = [f"{m} is dense and quantized" for m in dense & quantized]
    found += [f"{m} is dense, which config.json does not say" for m in sorted(dense) if not skipped(said, method, m)]
    found += [f"{m} is quantized, but skipped by config.json" for m in sorted(quantized) if skipped(said, method, m)]
    for m in sorted(quantized):
        found += misshapen(said, method, m, shapes)
        base, _, last = m.rpartition(".")
        for group in FUSED:
            if last in group and not all(f"{base}.{other}" in quantized for other in group):
                found.append(f"only some of {group} of {base} are quantized")
    return found


def skipped(said: dict[str, Any], method: str, module: str) -> bool:
    """Whether config.json says that a module is dense."""
    if method == "awq":
        return any(name in module for name in said["modules_to_not_convert"])
    if method == "gptq":
        return any(
            name.startswith("-:^") and name[3:-1].replace("\\", "") == module for name in said.get("dynamic", {})
        )
    return module in said["ignore"]


def misshapen(said: dict[str, Any], method: str, m: str, shapes: dict[str, list[int]]) -> list[str]:
    """Parts of a module that are missing, too many, or of other shapes than servers make room for."""
    if method == "compressed-tensors":
        groups = list(said["config_groups"].values())
        if len(groups) != 1:
            return []  # Widths that differ are told by patterns, which compressed-tensors itself resolves.
        weights = groups[0]["weights"]
        bits, g = weights["num_bits"], weights["group_size"]
        n, w = shapes[f"{m}.weight_packed"]
        k = w * 32 // bits
        needed = {"weight_packed": [n, w], "weight_scale": [n, k // (g or k)], "weight_shape": [2]}
        if not weights["symmetric"]:
            needed["weight_zero_point"] = [n * bits // 32, k // (g or k)]
    else:
        bits, g = said["bits"], said["group_size"]
        a, b = shapes[f"{m}.qweight"]
        k, n = (a, b * 32 // bits) if method == "awq" else (a * 32 // bits, b)
        groups = k // (k if g == -1 else g)
        needed = {"qweight": [a, b], "qzeros": [groups, n * bits // 32], "scales": [groups, n]}
        needed |= {"g_idx": [k]} if method == "gptq" else {}
    there = {name.removeprefix(f"{m}."): shape for name, shape in shapes.items() if name.startswith(f"{m}.")}
    there.pop("bias", None)
    return [f"{m} has {there}, not {needed}"] if there != needed else []

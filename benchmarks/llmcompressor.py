"""llm-compressor's AWQ or GPTQ on a Hugging Face folder, written as a dense folder that any scorer can read.

It runs in an environment of its own, beside awq_jax's and not in it, and needs no GPU:

  python -m venv peer && peer/bin/pip install llmcompressor==0.14.0.1
  peer/bin/python benchmarks/llmcompressor.py MODEL tokens.npy w3g64 awq OUT

tokens.npy holds the calibration tokens, (samples, length) integers: what calibration_tokens of
awq_jax.pipeline.calibration_text gives, so that both calibrate on the same ones. OUT gets the weights after
dequantization, with AWQ's scales folded into norms and linears: loaded as a plain model it computes the quantized one.
llm-compressor refuses a group that does not divide a linear's inputs; such linears get the largest group that divides
both (64 for 576 inputs and a group of 128).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import resource
import shutil
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

METHODS = ("rtn", "awq", "gptq", "awq+gptq")


def schemes(model: torch.nn.Module, bits: int, group: int) -> dict[str, QuantizationScheme]:
    """Asymmetric integers, as W4A16_ASYM has them; one scheme for each group size that is needed."""
    targets: dict[int, set[str]] = defaultdict(set)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            targets[math.gcd(module.in_features, group)].add(f"re:.*{name.rsplit('.', 1)[-1]}$")
    weights = lambda size: QuantizationArgs(num_bits=bits, strategy="group", group_size=size, symmetric=False)
    return {f"g{size}": QuantizationScheme(targets=sorted(t), weights=weights(size)) for size, t in targets.items()}


def modifiers(method: str, groups: dict[str, QuantizationScheme]) -> list[Any]:
    """The method with llm-compressor's own settings."""
    scaled = [AWQModifier()] if "awq" in method else []
    rounded = GPTQModifier if "gptq" in method else QuantizationModifier
    return [*scaled, rounded(config_groups=groups, ignore=["lm_head"])]


def quantize(model: torch.nn.Module, tokens: np.ndarray, bits: int, group: int, method: str) -> dict[str, float]:
    """Quantize the model where it is; seconds of the clock and of all processor cores."""
    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda self, *_: self  # AWQ pins what it caches, which fails without a GPU.
    columns = {"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()}
    start, busy = time.perf_counter(), processor_seconds()
    oneshot(
        model=model,
        dataset=Dataset.from_dict(columns),
        recipe=modifiers(method, schemes(model, bits, group)),
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
        pipeline="datafree" if method == "rtn" else "sequential",
    )
    return {"seconds": time.perf_counter() - start, "processor_seconds": processor_seconds() - busy}


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def dequantized(module: torch.nn.Module) -> torch.Tensor:
    args = module.quantization_scheme.weights
    return fake_quantize(module.weight, module.weight_scale, module.weight_zero_point, args)


def write(model: torch.nn.Module, names: list[str], source: Path, out: Path) -> None:
    """The named parameters of `model`, quantized ones dequantized, with everything else that `source` holds."""
    out.mkdir(parents=True, exist_ok=True)
    params = {name: p for name, p in model.named_parameters() if name in names}
    for name, module in model.named_modules():
        if hasattr(module, "quantization_scheme"):
            params[f"{name}.weight"] = dequantized(module)
    save_file({n: p.detach().contiguous() for n, p in params.items()}, out / "model.safetensors", {"format": "pt"})
    for file in source.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copyfile(file, out / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a Hugging Face model")
    parser.add_argument("tokens", type=Path, help=".npy of calibration tokens")
    parser.add_argument("kind", help="bits and group size, such as w3g64")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("out", type=Path, help="folder to write")
    a = parser.parse_args()
    kind = re.fullmatch(r"w(\d+)g(\d+)", a.kind) or parser.error(f"{a.kind}: give bits and group size, such as w3g64")
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    names = [name for name, _ in model.named_parameters()]
    spent = quantize(model, np.load(a.tokens), int(kind[1]), int(kind[2]), a.method)
    write(model, names, a.model, a.out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    versions = {name: version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")}
    print(json.dumps({"kind": a.kind, "method": a.method, **spent, "peak_gib": peak, **versions}))


if __name__ == "__main__":
    main()

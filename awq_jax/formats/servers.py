"""What servers run quantized weights on: a target has a format for each width, its own terms, and a rule for kernels.

Facts: vLLM 0.32 (auto_awq.py, auto_gptq.py, compressed_tensors_wNa16.py, marlin_utils.py), SGLang 0.5.23 (awq/awq.py),
tpu-inference's native path, transformers 5.24, mlx-lm 0.32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from awq_jax.weights.spec import QuantSpec

Kernel = Callable[[str, QuantSpec, int, int], str]
"""(format, spec, inputs, outputs) of what a server makes one matrix of -> what it runs it on."""
MARLIN_GROUPS = (-1, 32, 64, 128)
NOT_READ = "not read"


@dataclass(frozen=True)
class Target:
    """A server, or a library.

    Args:
      name: as `target` is given.
      formats: by bits the format that it reads fastest; the widths that it reads.
      groups: sizes of groups that its fast path reads, the preferred first.
      symmetric: what zero points have to be; None for any.
      why: what the choice rests on, a sentence.
      kernel: see Kernel.
    """

    name: str
    formats: Mapping[int, str]
    groups: Sequence[int]
    symmetric: Mapping[int, bool | None]
    why: str
    kernel: Kernel


def marlin(format: str, spec: QuantSpec) -> str | None:
    """Why weights of a kind do not run on the Marlin kernels; None if they do where their shape fits."""
    if format == "awq":
        types = spec.bits == 4
    elif format in ("gptq", "gptq_v2"):
        types = spec.bits in (4, 8) and spec.symmetric
    elif format == "compressed-tensors":
        types = spec.bits == 4 or (spec.bits == 8 and spec.symmetric)
    else:
        return NOT_READ
    if not types:
        return f"no Marlin kernel for {spec.bits} bits{'' if spec.symmetric else ' with zero points'}"
    return None if spec.group_size in MARLIN_GROUPS else f"no Marlin kernel for groups of {spec.group_size}"


def vllm(format: str, spec: QuantSpec, i: int, o: int) -> str:
    if why := marlin(format, spec):
        return why
    if i % spec.group(i):
        return f"refused: {i} inputs in groups of {spec.group(i)}"
    return "Marlin" if (o % 64, i % 128) == (0, 0) or (o % 128, i % 64) == (0, 0) else "Marlin, padded"


def sglang(format: str, spec: QuantSpec, i: int, o: int) -> str:
    if why := marlin(format, spec):
        return why
    if (o % 64, i % 128) == (0, 0):
        return "Marlin"
    return "awq_dequantize, slow" if format == "awq" else f"refused: {i} x {o} is no multiple of 128 x 64"


def vllm_tpu(format: str, spec: QuantSpec, i: int, o: int) -> str:
    if format == "compressed-tensors" and spec == QuantSpec(4, 32, symmetric=True):
        return "native 4-bit matmul"
    if format == "awq":
        return "torchax, made dense by XLA"
    return NOT_READ if format != "compressed-tensors" else "refused: not 4 bits, symmetric, in groups of 32"


def transformers(format: str, spec: QuantSpec, i: int, o: int) -> str:
    if format == "compressed-tensors":
        return "made dense at loading"
    return "GPTQModel" if format in ("awq", "gptq", "gptq_v2") else NOT_READ


def mlx(format: str, spec: QuantSpec, i: int, o: int) -> str:
    if format == "awq":
        return "quantized_matmul, after conversion at loading"
    return "quantized_matmul" if format == "mlx" else NOT_READ


TARGETS = {
    target.name: target
    for target in (
        Target(
            "vllm",
            {4: "awq", 8: "compressed-tensors"},
            (128, 64, 32),
            {4: None, 8: True},
            "vLLM runs AutoAWQ files of 4 bits, and compressed-tensors of 8 symmetric ones, on Marlin, in groups of "
            "32, 64 or 128",
            vllm,
        ),
        Target(
            "sglang",
            {4: "awq", 8: "compressed-tensors"},
            (128, 64, 32),
            {4: None, 8: True},
            "SGLang runs AutoAWQ files of 4 bits on Marlin where inputs divide by 128 and outputs by 64",
            sglang,
        ),
        Target(
            "transformers",
            {4: "awq", 8: "gptq"},
            (128, 64, 32),
            {4: None, 8: True},
            "transformers runs AutoAWQ and GPTQ files on GPTQModel's kernels, and makes compressed-tensors dense",
            transformers,
        ),
        Target(
            "vllm-tpu",
            {4: "compressed-tensors"},
            (32,),
            {4: True},
            "vLLM on TPUs reads compressed-tensors of 4 symmetric bits in groups of 32 in its native path",
            vllm_tpu,
        ),
        Target(
            "mlx",
            dict.fromkeys((2, 3, 4, 5, 6, 8), "mlx"),
            (64, 128, 32),
            {},
            "MLX multiplies its own affine layout, in groups of 32, 64 or 128",
            mlx,
        ),
    )
}

"""What servers run a weight on, and what a target chooses."""

import pytest

from awq_jax import QuantSpec, Recipe
from awq_jax.errors import InputError
from awq_jax.formats.servers import TARGETS
from awq_jax.pipeline.targets import for_target, kernels

SYM32 = QuantSpec(4, 32, symmetric=True)


@pytest.mark.parametrize(
    ("target", "format", "spec", "shape", "kernel"),
    [
        ("vllm", "awq", QuantSpec(4, 128), (4096, 4096), "Marlin"),
        ("vllm", "awq", QuantSpec(4, 64), (576, 576), "Marlin, padded"),
        ("vllm", "awq", QuantSpec(4, 96), (768, 576), "no Marlin kernel for groups of 96"),
        ("vllm", "gptq_v2", QuantSpec(4, 128), (4096, 4096), "no Marlin kernel for 4 bits with zero points"),
        ("vllm", "compressed-tensors", QuantSpec(8, -1, True), (4096, 4096), "Marlin"),
        ("vllm", "compressed-tensors", QuantSpec(3, 128), (4096, 4096), "no Marlin kernel for 3 bits with zero points"),
        ("vllm", "mlx", QuantSpec(4, 64), (4096, 4096), "not read"),
        ("sglang", "awq", QuantSpec(4, 64), (576, 576), "awq_dequantize, slow"),
        ("sglang", "awq", QuantSpec(4, 64), (1024, 64), "Marlin"),
        ("vllm-tpu", "compressed-tensors", SYM32, (64, 64), "native 4-bit matmul"),
        ("vllm-tpu", "compressed-tensors", QuantSpec(4, 64, True), (64, 64), "refused: not 4 bits"),
        ("vllm-tpu", "awq", QuantSpec(4, 64), (64, 64), "torchax"),
        ("transformers", "compressed-tensors", QuantSpec(4, 64), (64, 64), "made dense at loading"),
        ("mlx", "mlx", QuantSpec(3, 64), (64, 64), "quantized_matmul"),
    ],
)
def test_the_kernel_of_a_weight(target, format, spec, shape, kernel):
    assert TARGETS[target].kernel(format, spec, *shape).startswith(kernel)


def test_what_servers_make_one_matrix_of_is_judged_as_one():
    """Two key-value heads of 32 are no 64 columns, but with the queries they are."""
    weights = {name: ((128, n), QuantSpec(4, 64)) for name, n in (("q", 64), ("k", 32), ("v", 32), ("o", 32))}
    found = kernels(TARGETS["vllm"], "awq", weights, [("q", "k", "v")])
    assert found == {"q": "Marlin", "k": "Marlin", "v": "Marlin", "o": "Marlin, padded"}


@pytest.mark.parametrize(
    ("target", "recipe", "format", "symmetric", "group"),
    [
        ("vllm", Recipe(), "awq", False, None),
        ("vllm", Recipe(bits=8, group_size=64), "compressed-tensors", True, 64),
        ("sglang", Recipe(symmetric=True), "awq", True, None),
        ("transformers", Recipe(bits=8), "gptq", True, None),
        ("vllm-tpu", Recipe(), "compressed-tensors", True, 32),
        ("mlx", Recipe(bits=3), "mlx", False, None),
    ],
)
def test_a_target_chooses_and_says_why(target, recipe, format, symmetric, group):
    chosen, recipe, why = for_target(target, recipe)
    assert (chosen, recipe.symmetric, recipe.group_size) == (format, symmetric, group)
    assert why.startswith(f"For {target}: format {format}, {recipe.bits} bits")
    spec = recipe.spec
    assert TARGETS[target].kernel(format, spec, 4096, 4096) in (
        "Marlin",
        "GPTQModel",
        "native 4-bit matmul",
        "quantized_matmul",
    )


@pytest.mark.parametrize(
    ("target", "recipe", "more", "says"),
    [
        ("vllm", Recipe(bits=3), {}, "bits=3: target='vllm' reads 4, 8 bits fast. vLLM runs"),
        ("vllm-tpu", Recipe(group_size=64), {}, "group_size=64: target='vllm-tpu' reads groups of 32 fast"),
        ("vllm-tpu", Recipe(), {"average_bits": 3.5}, "bits=3.5: target='vllm-tpu' reads 4 bits fast"),
        ("vllm-tpu", Recipe(), {"format": "mlx"}, "format='mlx': target='vllm-tpu' takes format='compressed-tensors'"),
        ("vllm", Recipe(), {"format": "awq,gptq"}, "format='awq,gptq': target='vllm' takes format='awq': leave one"),
        ("vlm", Recipe(), {}, "target='vlm': choose one of vllm, .* .did you mean vllm"),
    ],
)
def test_what_a_target_does_not_read_is_told_before_any_work(target, recipe, more, says):
    with pytest.raises(InputError, match=says):
        for_target(target, recipe, **more)


def test_a_format_that_is_the_targets_is_no_contradiction():
    assert for_target("vllm", Recipe(), format="awq")[0] == "awq"

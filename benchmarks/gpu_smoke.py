"""Step "smoke": what is here, whether each implementation multiplies right, and the ceilings for all other steps."""

from __future__ import annotations

import functools as ft
import importlib.metadata
from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from decode import random_model, rounded
from gpu_checks import Case, cases, compiled, of_bound
from gpu_record import Record, Row

from awq_jax.commands import doctor
from awq_jax.kernels.gpu import architecture
from awq_jax.models.decoder import Decoder
from awq_jax.models.generate import generate
from awq_jax.weights.tensor import dequantize

PACKAGES = ("awq-jax", "jax", "jaxlib", "jax-triton", "triton", "flax", "torch", "numpy")
TWO_LAYERS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
TOY = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4}


def versions() -> Iterator[Row]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    yield Row("versions", ", ".join(f"{name} {version}" for name, version in found.items()))


def examined() -> Iterator[Row]:
    """The doctor's lines on the device and on what runs the matmuls."""
    for finding in doctor.examine():
        if finding.what.startswith(("device", "decode", "prefill")):
            yield Row(finding.what, f"{finding.found}{f' ({finding.advice})' if finding.advice else ''}")


def measured(record: Record) -> Iterator[Row]:
    top = record.ceilings()
    yield Row("copy, read + written", top["bytes_per_s"] / 1e12, "TB/s")
    yield Row("bfloat16 matmul", top["flop_per_s"] / 1e12, "TFLOP/s")
    yield Row("rows where both take as long, bfloat16", top["flop_per_s"] / top["bytes_per_s"], "rows")


def product(case: Case) -> Iterator[Row]:
    arguments = case.arguments()
    worst, norm = of_bound(case, compiled(case, arguments)(), arguments)
    yield Row(str(case), worst, "of the bound", 1.0, most=True)
    yield Row(f"{case}: error / product", norm, "", 1e-2, most=True)


def decoded(toy: bool) -> Iterator[Row]:
    """A model of two layers against the same weights made dense, in float32 on the same device."""
    dense = random_model(TWO_LAYERS | (TOY if toy else {}))
    small = rounded(dense, 64)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, dense.config.vocab, (1, 2) if toy else (2, 9)), jnp.int32)
    whole = jax.tree.map(lambda w: w.astype(jnp.float32), dequantize(small.params))
    run = jax.jit(lambda config, params: Decoder(config).apply({"params": params}, tokens), static_argnums=0)
    logits = lambda config, params: np.asarray(run(config, params))
    with jax.default_matmul_precision("highest"):
        exact = logits(replace(dense.config, dtype=jnp.float32), whole)
    error = np.linalg.norm(logits(small.config, small.params) - exact) / np.linalg.norm(exact)
    yield Row("two layers: logits against float32", float(error), "", 3e-2, most=True)
    text, again = (
        np.asarray(generate(small.config, small.params, tokens, max_new_tokens=2 if toy else 4)) for _ in range(2)
    )
    yield Row("two layers: tokens that differ when decoded twice", int((text != again).sum()), "", 0, most=True)


def some_of_each() -> list[Case]:
    """A case of each way that is right for tensor cores and copies of whole tiles alike."""
    ways = {case.way for case in cases(toy=False)}
    special = {"shared": {"ns": (320, 64)}, "scanned": {"lead": (2,)}, "ragged": {"m": 200, "lead": (4,)}}
    made = [Case(**({"way": way, "m": 13, "k": 1024, "ns": (320,)} | special.get(way, {}))) for way in sorted(ways)]
    return [*made, *(Case(way, 100, 1024, (320,)) for way in ("triton", "mosaic") if way in ways)]


def run(record: Record) -> None:
    record.attempt("versions", versions)
    record.attempt("doctor", examined)
    record.attempt("ceilings", ft.partial(measured, record))
    few = [case for case in cases(toy=True) if case.way in ("triton", "mosaic")]
    for case in few if record.toy else some_of_each():
        record.attempt(str(case), ft.partial(product, case))
    record.attempt("two layers", ft.partial(decoded, record.toy))
    record.add(Row("architecture", f"sm_{architecture()}"))

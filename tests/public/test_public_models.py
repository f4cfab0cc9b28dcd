"""Models of other people's packages, unchanged: which sites are found, and what they compute when quantized.

The models are tiny and their weights random, so the errors say that nothing is broken, not how good the method is.
"""

from __future__ import annotations

import functools as ft
from dataclasses import dataclass, field, replace

import jax
import numpy as np
import pytest
from public_models import PUBLIC
from quick import quick_compilation, quick_jit

import awq_jax as awq
from awq_jax.search import Grid, no_clip, to_nearest
from awq_jax.weights.tensor import is_quantized

GATHERED = "gather"


@dataclass(frozen=True)
class Found:
    """What `sites` says of a model, its names without `prefix` and `suffix`.

    Args:
      groups: the sites, those of one input in one string.
      folded: the first site of each fold.
      tied: sites that stay dense because the params are looked up too.
      skipped: other params, and why they are none.
      router: the site that decides between experts: it stays dense.
      loops: kernel calls that Python loops over experts add.
      noisy: AWQ is not compared with rounding to nearest: the output turns on which experts are taken.
    """

    groups: tuple[str, ...]
    folded: str
    prefix: str = ""
    suffixes: tuple[str, ...] = ("/kernel",)
    tied: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    router: str = ""
    loops: int = 0
    noisy: bool = False

    def short(self, name: str) -> str:
        return ft.reduce(str.removesuffix, self.suffixes, name.removeprefix(self.prefix))


EXPERTS = [f"feed_forward/experts_{k}" for k in range(8)]
FOUND = {
    "flax_linen_attention": Found(
        prefix="params/",
        groups=("attention/query attention/key attention/value", "attention/out", "Dense_1", "Dense_0"),
        folded="attention/query attention/out Dense_1",
    ),
    "flax_nnx_attention": Found(
        groups=("attention/query attention/key attention/value", "attention/out", "up", "down"),
        folded="attention/query attention/out down",
    ),
    "nanodl_gemma": Found(
        prefix="params/decoder/",
        groups=(
            "layers_0/attention/query_projection layers_0/attention/key_projection layers_0/attention/value_projection",
            "layers_0/attention/output",
            "layers_0/feed_forward/gate_proj layers_0/feed_forward/up_proj",
            "layers_0/feed_forward/down_proj",
            "outputs",
        ),
        # Its attention reshapes heads across tokens, and its residual reads the norm that the head reads too.
        folded="layers_0/feed_forward/down_proj layers_0/feed_forward/gate_proj",
        skipped={"embedding/embedding": GATHERED},
    ),
    "nanodl_mixtral": Found(
        prefix="params/decoder/layers_0/",
        suffixes=("/kernel", "_projection"),
        groups=(
            "attention1/query attention1/key attention1/value",
            "attention1/output",
            "attention2/query attention2/key attention2/value",
            "attention2/output",
            " ".join(["feed_forward/gate", *(f"{e}/dense{k}" for e in EXPERTS for k in (1, 3))]),
            *(f"{e}/dense2" for e in EXPERTS),
            "feed_forward/dense_final",
            "params/decoder/outputs",
        ),
        folded="feed_forward/gate",
        skipped={"params/decoder/embedding/embedding": GATHERED},
        router="feed_forward/gate",
    ),
    "haiku_transformer": Found(
        suffixes=("/w",),
        groups=(
            "transformer/multi_head_attention/query transformer/multi_head_attention/key "
            "transformer/multi_head_attention/value",
            "transformer/multi_head_attention/linear",
            "transformer/linear",
            "transformer/linear_1",
            "language_model/linear",
        ),
        folded="transformer/multi_head_attention/query transformer/multi_head_attention/linear transformer/linear "
        "language_model/linear",
        skipped={"language_model/positional_embeddings": "add", "language_model/embed/embeddings": GATHERED},
    ),
    "equimo_vit": Found(
        prefix="blocks/0/blocks/0/",
        suffixes=("/weight",),
        groups=("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2", "head"),
        folded="attn/qkv attn/proj mlp/fc1 head",
        skipped={
            "patch_embed/proj": "conv_general_dilated",
            "global_pos_embed": "add",
            "cls_token": "broadcast_in_dim",
            "reg_tokens": "broadcast_in_dim",
        },
    ),
    "attnax_decoder": Found(
        prefix="layers/0/",
        suffixes=("/kernel", "_proj"),
        groups=("self_attn/query self_attn/key self_attn/value", "self_attn/output", "ffn/gate ffn/up", "ffn/down"),
        folded="self_attn/query self_attn/output ffn/gate ffn/down",
        skipped={"token_embed/embed/embedding": GATHERED},
    ),
    "attnax_experts": Found(
        groups=("router gate_proj up_proj", "down_proj"), folded="down_proj", router="router", noisy=True
    ),
    "keras_decoder": Found(
        groups=(
            "grouped_query_attention/query grouped_query_attention/key grouped_query_attention/value",
            "grouped_query_attention/attention_output",
            "dense dense_1",
            "dense_2",
            "dense_3",
        ),
        folded="grouped_query_attention/query grouped_query_attention/attention_output dense dense_2 dense_3",
        skipped={"embedding/embeddings": GATHERED},
    ),
    "penzai_gemma": Found(
        prefix="transformer/",
        suffixes=("/value/data_array", ".weights", "_linear"),
        groups=(
            "block_0/attention/query block_0/attention/key block_0/attention/value",
            "block_0/attention/output",
            "block_0/mlp/gating block_0/mlp/value",
            "block_0/mlp/out",
            "embedder.embeddings",
        ),
        folded="block_0/attention/query block_0/attention/output block_0/mlp/gating block_0/mlp/out",
        tied=("embedder.embeddings",),
    ),
    "tunix_qwen3": Found(
        prefix="layers/0/",
        suffixes=("/kernel", "/w", "_proj"),
        groups=("attn/q attn/k attn/v", "attn/o", "mlp/gate mlp/up", "mlp/down", "lm_head"),
        folded="attn/q attn/o mlp/gate mlp/down lm_head",
        skipped={"embedder/input_embedding": GATHERED},
    ),
    # A loop over the experts in Python takes w[k].
    "tunix_qwen3_moe": Found(
        prefix="layers/0/",
        suffixes=("/kernel", "/w", "_proj"),
        groups=("attn/q attn/k attn/v", "attn/o", "mlp/router", "mlp/gate mlp/up", "mlp/down", "lm_head"),
        folded="attn/q attn/o lm_head",
        skipped={"embedder/input_embedding": GATHERED},
        router="mlp/router",
        loops=6,
    ),
    "tunix_gemma3": Found(
        prefix="layers/0/",
        suffixes=("/kernel", "/w", "_proj", "_einsum"),
        groups=("attn/q attn/kv", "attn/attn_vec", "mlp/gate mlp/up", "mlp/down", "embedder/input_embedding"),
        folded="attn/q attn/attn_vec mlp/gate mlp/down",
        tied=("embedder/input_embedding",),
    ),
}


def model_param(name: str):
    return pytest.param(name, marks=[pytest.mark.model] * name.startswith("tunix"))


EVERY = pytest.mark.parametrize("name", [model_param(name) for name in PUBLIC])
# The packages' own: what their code calls is going out of use.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@ft.cache
def calibrated(name: str) -> awq.Calibration:
    model = PUBLIC[name]()
    with quick_compilation():
        return awq.calibrate(model.fn, model.params, [model.inputs(seed) for seed in range(8)])


def quantized_by(name: str, recipe: awq.Recipe):
    with quick_compilation():
        return awq.quantize(PUBLIC[name]().params, calibrated(name), replace(recipe, group_size=32))


def dense_again(params):
    return jax.tree.map(lambda w: w.dequantize() if is_quantized(w) else w, params, is_leaf=is_quantized)


def count(params) -> int:
    return sum(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized)))


@EVERY
def test_the_sites_of_a_public_model(name):
    expected, traced = FOUND[name], calibrated(name).traced
    groups: dict[str, list[str]] = {}
    for site in traced.sites.values():
        groups.setdefault(site.group, []).append(expected.short(site.name))
    assert {frozenset(group) for group in groups.values()} == {frozenset(group.split()) for group in expected.groups}
    assert {expected.short(n): why for n, why in traced.skipped.items()} == expected.skipped
    assert {expected.short(fold.sites[0]) for fold in traced.folds} == set(expected.folded.split())
    kept = {*expected.tied, expected.router} - {""}
    assert {expected.short(n) for n, site in traced.sites.items() if site.kept} == kept


@EVERY
def test_a_quantized_public_model(name, doors):
    model, expected = PUBLIC[name](), FOUND[name]
    dense, quantized = quick_jit(model.fn), quick_jit(awq.quantized(model.fn))
    params, report = quantized_by(name, awq.Recipe())
    nearest, _ = quantized_by(name, awq.PRESETS["rtn"])
    x = model.inputs(100)
    doors |= {"kernel": 0, "dense": 0}
    found = quantized(params, *x)
    sites = len(calibrated(name).traced.sites) - len(expected.tied) - bool(expected.router)
    assert count(params) == sites
    assert doors == {"kernel": sites + expected.loops, "dense": 0}
    assert {expected.short(s.name) for s in report if s.spec is None} >= {*expected.tied, *expected.skipped}

    half = found.dtype != np.float32
    stands_for = np.asarray(dense(dense_again(params), *x), np.float32)
    assert np.abs(found - stands_for).max() < (2e-2 if half else 1e-5) * np.abs(stands_for).max()

    assert all(s.error < s.nearest_error for s in report if s.spec)
    if not expected.noisy:
        errors = [output_error(quantized, q, dense, model) for q in (params, nearest)]
        print(f"\n{name}: output error {errors[0]:.2%}, nearest {errors[1]:.2%}")
        assert errors[0] < errors[1]


def output_error(quantized, params, dense, model) -> float:
    """Relative to the dense output's size, on inputs that were not seen."""
    pairs = [(quantized(params, *x), dense(model.params, *x)) for x in map(model.inputs, range(100, 104))]
    off, whole = (
        np.asarray([np.sum(np.square(a), dtype=np.float64) for a in part])
        for part in zip(*((np.float32(q) - np.float32(d), np.float32(d)) for q, d in pairs), strict=True)
    )
    return float(off.sum() / whole.sum()) ** 0.5


FOLDED = awq.Recipe(scale=Grid((0.0, 0.5)), clip=no_clip, rounding=to_nearest, scales="folded")


@EVERY
def test_a_folded_public_model(name):
    """`quantize` compares the folded function with the dense one before it rounds."""
    model = PUBLIC[name]()
    params, _ = quantized_by(name, FOLDED)
    scales = [w.input_scale for w in jax.tree.leaves(params, is_leaf=is_quantized) if is_quantized(w)]
    assert all(s is None for s in scales)
    found = quick_jit(awq.quantized(model.fn))(params, *model.inputs(100))
    assert np.isfinite(np.float32(found)).all()

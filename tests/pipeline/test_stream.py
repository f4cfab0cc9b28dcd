"""Streaming a decoder: what is written and reported, in which dtype it is calibrated, how often it compiles."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from quick import quick_compilation
from tiny import hf_config, random_params

from awq_jax.models import llama
from awq_jax.pipeline.stream import Decoder, stream
from awq_jax.transforms.recipe import Recipe
from awq_jax.weights.tensor import is_quantized

RECIPE = Recipe(group_size=32, fold=True)


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compilation():
        yield


def decoder(layers=2):
    config = dataclasses.replace(llama.Config.from_hf(hf_config()), layers=layers)
    params = random_params(config)
    outer = {k: v for k, v in params.items() if not k.startswith("layers_")}
    parts = {"outer": outer} | {k: v for k, v in params.items() if k.startswith("layers_")}
    names = {name: w for part, leaf in parts.items() for name, w in llama.to_names(part, leaf).items()}
    return Decoder(llama, config, lambda name: np.asarray(names[name]))


def streamed(model, **options):
    tokens = np.random.default_rng(0).integers(0, model.config.vocab, (4, 32)).astype(np.int32)
    written = {}
    done = stream(model, tokens, RECIPE, written.__setitem__, **options)
    return written, done


@pytest.fixture(scope="module")
def in_float32():
    return streamed(decoder(), dtype=jnp.float32)


def test_every_part_is_written_and_every_site_reported_in_order(in_float32):
    written, done = in_float32
    assert list(written) == ["outer", "layers_0", "layers_1"]
    assert [r.name.split("/")[0] for r in done.reports] == ["layers_0"] * 7 + ["layers_1"] * 7
    assert all(0 < r.error < r.nearest_error for r in done.reports)
    assert set(done.seconds) == {"load", "trace", "statistics", "search", "write"}


def test_in_bfloat16_the_statistics_are_nearly_the_same(in_float32):
    written, done = streamed(decoder(), dtype=jnp.bfloat16)
    for a, b in zip(done.reports, in_float32[1].reports, strict=True):
        assert a.name == b.name
        assert a.error == pytest.approx(b.error, rel=0.1)
    leaves = jax.tree.leaves(written["layers_1"], is_leaf=is_quantized)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


def test_after_quantized_blocks_the_second_block_sees_something_else(in_float32):
    written, _ = streamed(decoder(), dtype=jnp.float32, feed="quantized")
    same = [
        all(
            np.array_equal(a, b)
            for a, b in zip(*(jax.tree.leaves(w[part]) for w in (written, in_float32[0])), strict=True)
        )
        for part in ("outer", "layers_0", "layers_1")
    ]
    assert same == [True, True, False]


def test_more_layers_compile_no_more():
    found = []
    for layers in (2, 4):
        jax.clear_caches()
        with compilations() as compiled:
            streamed(decoder(layers), dtype=jnp.float32)
        found.append(compiled)
    two, four = found
    assert two == four
    assert four["solve_sites"] == four["scale_of_fold"] == 4


@pytest.mark.parametrize("loud", ["down_proj", "up_proj"])
def test_the_largest_activation_is_told(loud):
    """In the residual, or inside the block only: what gate and up make of each other before a quiet down."""
    model, quiet = decoder(layers=1), {"up_proj": "down_proj"}.get(loud, "")
    factor = {f"model.layers.0.mlp.{loud}.weight": 1e5, f"model.layers.0.mlp.{quiet}.weight": 1e-5}
    loudly = dataclasses.replace(model, read=lambda name: model.read(name) * np.float32(factor.get(name, 1)))
    unsolved = lambda name, params, calibration, recipe: (params, ())
    before, after = (streamed(one, dtype=jnp.float32, solve=unsolved)[1].largest for one in (model, loudly))
    assert 1 < before < 100
    assert 1e4 < after < 1e7

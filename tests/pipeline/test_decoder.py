"""Streaming a decoder: what is written and reported, in which dtype it is calibrated, how often it compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from quick import quick_compilation
from tiny import config_of, hf_config, random_params

from awq_jax.models.decoder import hidden
from awq_jax.pipeline.decoder import as_function, stream_decoder
from awq_jax.transforms.recipe import Recipe
from awq_jax.transforms.stream import Lazy
from awq_jax.weights.tensor import is_quantized

RECIPE = Recipe(group_size=32, scales="both")


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compilation():
        yield


def decoder(layers=2, **factors):
    config = config_of(hf_config(num_hidden_layers=layers))
    params = random_params(config)
    for name, factor in factors.items():
        params["layers_0"]["mlp"][name]["kernel"] *= np.float32(factor)
    return config, params


def tokens_of(config):
    return np.random.default_rng(0).integers(0, config.vocab, (4, 32)).astype(np.int32)


def streamed(config, params, **options):
    written = {}
    done = stream_decoder(config, params, tokens_of(config), RECIPE, written.__setitem__, **options)
    return written, done


@pytest.fixture(scope="module")
def in_float32():
    return streamed(*decoder(), dtype=jnp.float32)


def test_every_layer_is_written_and_every_site_reported_in_order(in_float32):
    written, done = in_float32
    assert list(written) == ["layers_0", "layers_1"]
    assert [r.name.split("/")[0] for r in done.reports] == ["layers_0"] * 7 + ["layers_1"] * 7
    assert all(0 < r.error < r.nearest_error for r in done.reports)
    assert set(done.seconds) == {"load", "trace", "statistics", "search", "write"}


def test_in_bfloat16_the_statistics_are_nearly_the_same(in_float32):
    written, done = streamed(*decoder(), dtype=jnp.bfloat16)
    for a, b in zip(done.reports, in_float32[1].reports, strict=True):
        assert a.name == b.name
        assert a.error == pytest.approx(b.error, rel=0.1)
    leaves = jax.tree.leaves(written["layers_1"], is_leaf=is_quantized)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


def test_after_quantized_blocks_the_second_block_sees_something_else(in_float32):
    written, _ = streamed(*decoder(), dtype=jnp.float32, feed="quantized")
    for part, norms in (("layers_0", True), ("layers_1", False)):
        pairs = zip(*(jax.tree.leaves(w[part]["attn"]) for w in (written, in_float32[0])), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs) == norms


def test_more_layers_compile_no_more():
    found = []
    for layers in (3, 5):
        jax.clear_caches()
        with compilations() as compiled:
            streamed(*decoder(layers), dtype=jnp.float32)
        found.append(compiled)
    few, many = found
    assert few == many
    assert few["solve_sites"] == few["scale_of_fold"] == 4


@pytest.mark.parametrize("loud", ["down", "up"])
def test_the_largest_activation_is_told(loud):
    """In the residual, or inside the block only: what gate and up make of each other before a quiet down."""
    factors = {"down": {"down": 1e5}, "up": {"up": 1e5, "down": 1e-5}}[loud]
    unsolved = lambda params, calibration, recipe: (params, ())
    models = (decoder(layers=1), decoder(layers=1, **factors))
    before, after = (streamed(*one, dtype=jnp.float32, solve=unsolved)[1].largest for one in models)
    assert 1 < before < 100
    assert 1e4 < after < 1e7


def test_of_the_embedding_only_the_rows_that_tokens_name_are_read():
    config, params = decoder()
    asked, embedding = [], params["embed"]["embedding"]
    lazy = Lazy(embedding.shape, embedding.dtype, lambda index: asked.append(index) or np.asarray(embedding)[index])
    tokens = np.array([[5, 90, 5], [7, 90, 7]], np.int32)
    fn, given, named = as_function(config, params | {"embed": {"embedding": lazy}}, tokens)
    rows = given["embed"]["embedding"]
    assert rows.shape == (3, config.width)
    np.testing.assert_array_equal(rows[...], embedding[np.array([5, 7, 90])])
    assert [list(index) for index in asked] == [[5, 7, 90]]
    read = given | {"embed": {"embedding": rows[...]}}
    np.testing.assert_array_equal(fn(read, jnp.asarray(named)), hidden(config, params, jnp.asarray(tokens)))

"""Importance: tokens weighted by the squared gradient at a site's output."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from tiny import hf_config, random_params

from awq_jax.models import llama
from awq_jax.recipe import Recipe
from awq_jax.sites import sites
from awq_jax.stream import Decoder, label_gradient, stream
from awq_jax.transform import with_importance


def two_layers(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_moments_are_weighted_by_the_squared_gradient_at_the_output():
    params = {"first": drawn(8, 6), "second": drawn(6, 5, seed=1)}
    x, cotangent = drawn(3, 4, 8, seed=2), drawn(3, 4, 5, seed=3)
    observed = jax.jit(with_importance(two_layers, sites(two_layers, params, x), block=None))
    moments, back = observed(params, x, cotangent)

    inner = np.tanh(x @ params["first"])
    gradients = {"second": cotangent, "first": cotangent @ params["second"].T * (1 - inner**2)}
    for name, inputs in (("first", x), ("second", inner)):
        weight = (gradients[name] ** 2).sum(-1)
        weight = (weight / weight.mean()).reshape(-1)
        flat = inputs.reshape(-1, inputs.shape[-1])
        np.testing.assert_allclose(moments[name].gram[0], (flat * weight[:, None]).T @ flat, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(moments[name].abs_sum, np.abs(flat).T @ weight, rtol=2e-4)
    np.testing.assert_allclose(back, gradients["first"] @ params["first"].T, rtol=2e-4, atol=2e-5)


def test_label_gradient_is_that_of_the_likelihood_of_one_token_each():
    table, hidden = drawn(6, 9), drawn(2, 4, 6, seed=1)
    found = label_gradient(lambda outer, h: h @ outer, table, jnp.asarray(hidden), jax.random.key(0))
    p = np.asarray(jax.nn.softmax(hidden @ table))
    candidates = (np.eye(9) - p[..., None, :]) @ table.T
    distance = np.abs(np.asarray(found)[..., None, :] - candidates).max(-1).min(-1)
    assert (distance < 1e-5).all()


def test_streaming_backwards_writes_every_block_and_reports_in_order():
    config = llama.Config.from_hf(hf_config())
    params = random_params(config)
    names = {k: v for part, leaf in parts(params) for k, v in llama.to_names(part, leaf).items()}
    tokens = np.random.default_rng(0).integers(0, config.vocab, (4, 32)).astype(np.int32)
    written = {}
    recipe = Recipe(group_size=32, fold=True)
    for importance in (False, True):
        decoder = Decoder(llama, config, lambda name: np.asarray(names[name]))
        done = stream(decoder, tokens, replace(recipe, importance=importance), written.__setitem__)
        assert set(written) == {"outer", *(f"layers_{i}" for i in range(config.layers))}
        layers = [int(r.name.split("/")[0].removeprefix("layers_")) for r in done.reports]
        assert layers == sorted(layers)
        assert all(r.error <= r.nearest_error for r in done.reports)


def parts(params):
    outer = {k: v for k, v in params.items() if not k.startswith("layers_")}
    return [("outer", outer), *((k, v) for k, v in params.items() if k.startswith("layers_"))]

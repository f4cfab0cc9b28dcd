"""Distilling the steps, on functions small enough to check."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

import awq_jax as awq
from awq_jax.transforms.distill import distill, kl_of_logits
from awq_jax.weights.paths import named_leaves
from awq_jax.weights.tensor import is_quantized

RNG = np.random.default_rng(0)
BATCHES = [(RNG.integers(0, zoo.VOCAB, (4, 12), dtype=np.int32),) for _ in range(3)]


def kl(model, params, run):
    return float(np.mean([kl_of_logits(model.fn(model.params, *b), run(params, *b)) for b in BATCHES]))


@pytest.mark.parametrize("name", ["llama", "llama_scanned"])
def test_distilled_steps_are_nearer_to_the_dense_model(name, doors):
    model = zoo.ZOO[name]()
    recipe = replace(awq.PRESETS["rtn"], bits=3, group_size=32)
    q, _ = awq.quantize(model.params, awq.calibrate(model.fn, model.params, BATCHES), recipe)
    losses = []
    tuned = distill(model.fn, model.params, q, BATCHES * 8, rate=1e-2, progress=losses.append)
    assert doors["kernel"] >= 8
    assert doors["dense"] == 0
    run = jax.jit(awq.quantized(model.fn))
    assert kl(model, tuned, run) < 0.8 * kl(model, q, run)
    assert len(losses) == 24
    assert losses[0] == pytest.approx(
        float(kl_of_logits(model.fn(model.params, *BATCHES[0]), run(q, *BATCHES[0]))), rel=1e-3
    )
    before, after = named_leaves(q), named_leaves(tuned)
    assert jax.tree.structure(q) == jax.tree.structure(tuned)
    for site, w in before.items():
        if is_quantized(w):
            np.testing.assert_array_equal(w.codes, after[site].codes)
            assert after[site].scales.dtype == w.scales.dtype
            assert (after[site].scales != w.scales).any()
        else:
            assert after[site] is w


def test_the_divergence_is_that_of_the_distributions():
    dense, small = RNG.normal(size=(3, 5)), RNG.normal(size=(3, 5))
    p, q = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (dense, small))
    np.testing.assert_allclose(kl_of_logits(dense, small), (p * np.log(p / q)).sum(-1).mean(), rtol=1e-4)


def test_another_loss_and_a_rate_that_explodes():
    fn = lambda p, x: x @ p["w"]
    params, x = {"w": jnp.asarray(RNG.normal(size=(32, 8)), jnp.float32)}, RNG.normal(size=(64, 32)).astype("f4")
    q, _ = awq.quantize(params, awq.calibrate(fn, params, [(x,)]), replace(awq.PRESETS["rtn"], bits=2, group_size=32))
    mse = lambda a, b: jnp.mean((a - b) ** 2)
    tuned = distill(fn, params, q, [(x,)] * 50, rate=1e-2, loss=mse)
    errors = [float(mse(fn(params, x), awq.quantized(fn)(w, x))) for w in (q, tuned)]
    assert errors[1] < 0.9 * errors[0]
    with pytest.raises(ValueError, match="the loss of batch 1 is nan: lower the rate"):
        distill(fn, params, q, [(x * np.nan,)], loss=mse)
    with pytest.raises(ValueError, match="none of the params is a QuantizedTensor"):
        distill(fn, params, params, [(x,)], loss=mse)
    with pytest.raises(ValueError, match="A batch is a tuple of inputs"):
        distill(fn, params, q, [x], loss=mse)

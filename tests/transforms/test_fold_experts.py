"""A norm's fold into a router and its experts: one scale for all of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax import lax
from quick import quick_compilation, quick_jit
from reference import problem

import awq_jax as awq
from awq_jax.search import Grid, no_clip, to_nearest
from awq_jax.search.moments import of
from awq_jax.search.solve_sites import scale_of_fold
from awq_jax.tracing.view import View
from awq_jax.transforms.quantize import fold_scales, plan
from awq_jax.weights.paths import named_leaves

RECIPE = awq.Recipe(group_size=32, scale=Grid((0.0, 0.5)), clip=no_clip, rounding=to_nearest)
FOLDED = dataclasses.replace(RECIPE, scales="folded")
EXPERTS = 3
X = problem(64)[0]


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compilation():
        yield


def params():
    matrices = lambda seed: np.stack([problem(64, 32, seed=seed + k)[1] for k in range(EXPERTS)])
    down = matrices(20).transpose(0, 2, 1)
    norm = np.exp(np.random.default_rng(0).normal(size=64)).astype("f4")
    return {"norm": norm, "router": problem(64, EXPERTS)[1], "gate": matrices(0), "up": matrices(10), "down": down}


def sorted_rows(p, x):
    y = zoo.rms(x, p["norm"])
    chosen = (y @ p["router"]).argmax(-1)
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=EXPERTS).astype(jnp.int32)
    rows = y[order]
    hidden = jax.nn.silu(lax.ragged_dot(rows, p["gate"], sizes)) * lax.ragged_dot(rows, p["up"], sizes)
    return x.at[order].add(lax.ragged_dot(hidden, p["down"], sizes))


def rows_of_zeros(p, x):
    """Every expert on every token, on zeros where another one is chosen."""
    y = zoo.rms(x, p["norm"])
    chosen = jax.nn.one_hot((y @ p["router"]).argmax(-1), EXPERTS, axis=0)
    rows = jnp.einsum("et,ti->eti", chosen, y)
    hidden = jax.nn.silu(jnp.einsum("eti,eio->eto", rows, p["gate"])) * jnp.einsum("eti,eio->eto", rows, p["up"])
    return x + jnp.einsum("eti,eio->eto", hidden, p["down"]).sum(0)


def scanned(p, x):
    return lax.scan(lambda x, layer: (rows_of_zeros(layer, x), None), x, p)[0]


MODELS = {
    "sorted": (sorted_rows, params()),
    "in a scan": (scanned, jax.tree.map(lambda w: np.stack([w, w[..., ::-1]]), params())),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    fn, tree = MODELS[request.param]
    return fn, tree, awq.calibrate(fn, tree, [(X,)], block=None)


def test_the_folded_params_compute_the_same_function(model):
    fn, tree, calibration = model
    todo = plan(calibration, FOLDED)
    folded, scales = fold_scales(tree, calibration, FOLDED, todo)
    assert set(scales) == {"router", "gate", "up", "down"}
    assert set(todo.specs) >= {"gate", "up", "down"}
    changed = {name for name, w in named_leaves(folded).items() if not np.allclose(w, named_leaves(tree)[name])}
    assert changed == {"norm", "router", "gate", "up", "down"}
    expected, found = (quick_jit(fn)(p, X) for p in (tree, folded))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_experts_need_no_input_scales_and_err_no_more(model):
    _, tree, calibration = model
    none, beside, folded = (
        awq.quantize(tree, calibration, dataclasses.replace(RECIPE, scales=scales))
        for scales in ("none", "beside", "both")
    )
    kept = lambda found: {n for n, w in named_leaves(found[0]).items() if getattr(w, "input_scale", None) is not None}
    assert kept(beside) >= {"gate", "up", "down"}
    assert kept(folded) == set()
    error = lambda found: np.mean([r.error for r in found[1] if r.spec])
    assert error(folded) < 0.97 * error(none)


def test_experts_with_another_spec_than_the_router_do_not_fold():
    _, tree = MODELS["sorted"]
    calibration = awq.calibrate(sorted_rows, tree, [(X,)])
    rules = (awq.Rule("router", bits=8),)
    found = plan(calibration, dataclasses.replace(FOLDED, rules=rules))
    assert found.notes["gate"] == "not folded: its sites have different specs"


def test_the_scale_is_that_of_the_experts_side_by_side():
    x, w = problem(64, 12)
    layout, number = View.of((3, 64, 4)).layout([0], [1]), np.arange(64)
    experts = np.stack([w[:, :4], w[:, 4:8], w[:, 8:]])
    parts = [of(part, None) for part in np.split(x, 3)]
    apart = jax.tree.map(lambda *a: jnp.stack(a), *parts)
    options = {"n": 64, "spec": awq.QuantSpec(4, 32), "strategy": awq.Recipe().scale}
    found, _ = scale_of_fold((experts,), (apart,), number, layouts=(layout,), **options)
    voters = np.concatenate([experts[k][:, ::3] for k in range(3)], 1)
    flat = View.of(voters.shape).layout([], [0])
    expected, _ = scale_of_fold((voters,), (of(x, None),), number, layouts=(flat,), **options)
    np.testing.assert_allclose(found, expected, rtol=1e-5)

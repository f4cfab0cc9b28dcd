"""Sites inside loops, branches, turned stacks, sorted experts and 1 x 1 convolutions: what they see and compute."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax import lax
from quick import quick_jit as jit
from test_transform import check, dense_again, inputs_of_layers, normal, observed, same, with_random_codes

import awq_jax as awq
from awq_jax.tracing.sites import sites
from awq_jax.transforms.folding import fold

X = normal(10, 32)
W = normal(32, 32, seed=1) / 6
V = normal(32, 32, seed=2) / 6
LAYERS = normal(3, 32, 32, seed=3) / 6


def step(x, w):
    return jnp.tanh(x @ w), None


def turned(p, x):
    """The layers are the middle axis, as MaxText keeps them."""
    return lax.scan(step, x, jnp.moveaxis(p, 1, 0))[0]


def turned_twice(p, x):
    """(in, outer, out, inner): a scan in a scan, both over axes that are not the first."""
    outer = lambda x, w: lax.scan(step, x, jnp.moveaxis(w, 2, 0))
    return lax.scan(outer, x, p.transpose(1, 0, 2, 3))[0]


def branch(p, x):
    return lax.cond(x[0, 0] > 0, lambda x: jnp.tanh(x @ p["w"]), lambda x: x @ p["v"], x)


def loop(p, x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])), (0, x))[1]


def experts(p, x):
    """Sorted rows: the first expert gets 4 of them, the second none."""
    return lax.ragged_dot(x, p["w"], jnp.array([4, 0, 6]))


def pointwise(p, x):
    """A 1 x 1 convolution with stride 2 of an image (1, 5, 2, 32)."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x.reshape(1, 5, 2, 32), p["w"], (2, 1), "VALID", dimension_numbers=numbers)


def channels_first(p, x):
    return lax.conv(x.reshape(1, 5, 2, 32).transpose(0, 3, 1, 2), p["w"], (1, 1), "VALID")


def unrolled(p, x):
    """A Python loop over stacked layers."""
    for k in range(3):
        x, _ = step(x, p[k])
    return x


def experts_in_a_loop(p, x):
    """In each of two scanned layers every expert reads the tokens, as a Python loop; the matrices are [out, in]."""
    return lax.scan(lambda x, w: (jnp.tanh(sum(x @ w[k].T for k in range(3))), None), x, p)[0]


TWO = {"w": W, "v": V}
FUNCTIONS = {
    "turned": (turned, LAYERS.transpose(1, 0, 2)),
    "turned twice": (turned_twice, np.stack([LAYERS, -LAYERS]).transpose(2, 0, 3, 1)),
    "layers last": (lambda p, x: lax.scan(step, x, jnp.moveaxis(p, 2, 0))[0], LAYERS.transpose(1, 2, 0)),
    "unrolled": (unrolled, LAYERS),
    "unrolled, layers last": (lambda p, x: unrolled([p[:, :, k] for k in range(3)], x), LAYERS.transpose(1, 2, 0)),
    "experts in a loop in a scan": (experts_in_a_loop, np.stack([LAYERS, -LAYERS])),
    "branch": (branch, TWO),
    "loop": (loop, {"w": W}),
    "ragged_dot": (experts, {"w": normal(3, 32, 8, seed=4) / 6}),
    "ragged_dot of turned experts": (
        lambda p, x: lax.ragged_dot(x, p["w"].transpose(0, 2, 1), jnp.array([4, 0, 6])),
        {"w": normal(3, 8, 32, seed=4) / 6},
    ),
    "1 x 1 convolution": (pointwise, {"w": normal(1, 1, 32, 8, seed=5) / 6}),
    "1 x 1 convolution, channels first": (channels_first, {"w": normal(8, 32, 1, 1, seed=5) / 6}),
}


@pytest.mark.parametrize("transform", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_one_goes_through_the_kernel(name, transform, doors):
    fn, params = FUNCTIONS[name]
    q, n = with_random_codes(zoo.Model(fn, params, (X,)))
    assert n == (2 if name == "branch" else 1)
    found = jit(transform(awq.quantized(transform(fn))))(q, X)
    assert doors["dense"] == 0
    assert doors["kernel"] >= n
    same(found, jit(fn)(dense_again(q), X))


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "ragged" not in name and name != "branch"])
def test_vmapped_ones_go_through_the_kernel(name, doors):
    fn, params = FUNCTIONS[name]
    batch = np.stack([X, -X])
    q, n = with_random_codes(zoo.Model(jax.vmap(fn, (None, 0)), params, (batch,)))
    found = jit(awq.quantized(jax.vmap(fn, (None, 0))))(q, batch)
    assert doors["dense"] == 0
    assert doors["kernel"] >= n >= 1
    same(found, jit(jax.vmap(fn, (None, 0)))(dense_again(q), batch))


@pytest.mark.parametrize("name", ["turned", "layers last", "unrolled", "unrolled, layers last"])
def test_a_stack_is_one_site_with_moments_by_layer(name):
    fn, params = FUNCTIONS[name]
    (site,) = sites(fn, params, X).sites.values()
    assert (site.stacked, site.in_features, site.out_features) == (1, 32, 32)
    np.testing.assert_array_equal(site.layout.apply(jnp.asarray(params)), LAYERS)
    check(observed(fn, params, X)[""], inputs_of_layers(X, LAYERS))


def test_experts_picked_in_a_scan_have_moments_by_layer_and_expert():
    fn, params = FUNCTIONS["experts in a loop in a scan"]
    (site,) = sites(fn, params, X).sites.values()
    assert (site.stack, site.refused) == ((0, 0), "sliced layer by layer")
    first = np.tanh(sum(X @ w.T for w in params[0]))
    check(observed(fn, params, X)[""], np.stack([np.stack([x] * 3) for x in (X, first)]))


def test_a_layer_that_is_never_picked_has_no_moments():
    found = observed(lambda p, x: x @ p[0] + jnp.tanh(x) @ p[2] + x @ p[0], LAYERS, X)[""]
    np.testing.assert_array_equal(found.count, [20, 0, 10])
    check(jax.tree.map(lambda a: a[2], found), np.tanh(X))


def test_a_layer_that_is_picked_before_all_are_scanned():
    found = observed(lambda p, x: lax.scan(step, jnp.tanh(x @ p[1]), p)[0], LAYERS, X)[""]
    first = np.tanh(X @ LAYERS[1])
    seen = list(inputs_of_layers(first, LAYERS))
    check(jax.tree.map(lambda a: a[::2], found), np.stack(seen[::2]))
    check(jax.tree.map(lambda a: a[1], found), np.concatenate([X, seen[1]]))


def test_a_loop_over_layers_is_quantized_like_a_scan():
    recipe = awq.Recipe(group_size=32)
    found, _ = awq.quantize(LAYERS, awq.calibrate(unrolled, LAYERS, [(X,)]), recipe)
    scanned = lambda p, x: lax.scan(step, x, p)[0]
    expected, _ = awq.quantize(LAYERS, awq.calibrate(scanned, LAYERS, [(X,)]), recipe)
    np.testing.assert_array_equal(found.codes, expected.codes)


def test_a_stack_turned_twice():
    fn, params = FUNCTIONS["turned twice"]
    every = np.stack([LAYERS, -LAYERS])
    (site,) = sites(fn, params, X).sites.values()
    np.testing.assert_array_equal(site.layout.apply(jnp.asarray(params)), every)
    np.testing.assert_array_equal(site.layout.undo(jnp.asarray(every)), params)
    seen = inputs_of_layers(X, every.reshape(6, 32, 32)).reshape(2, 3, 10, 32)
    check(observed(fn, params, X)[""], seen)


def test_a_turned_stack_is_quantized_like_its_layers():
    recipe = awq.Recipe(group_size=32)
    fn, params = FUNCTIONS["turned"]
    q, _ = awq.quantize(params, awq.calibrate(fn, params, [(X,)]), recipe)
    assert q.shape == params.shape
    plain = lambda p, x: lax.scan(step, x, p)[0]
    expected, _ = awq.quantize(LAYERS, awq.calibrate(plain, LAYERS, [(X,)]), recipe)
    np.testing.assert_allclose(q.dequantize(), expected.dequantize().transpose(1, 0, 2), rtol=1e-3, atol=1e-3)


def test_turned_stacks_fold():
    """A norm (features, layers) and two matrices (in, layers, out)."""

    def fn(p, x):
        layer = lambda x, p: (x + jnp.tanh(x * p["norm"][None] @ p["up"]) @ p["down"], None)
        moved = {k: jnp.moveaxis(w, 1, 0) for k, w in p.items()}
        return lax.scan(layer, x, moved)[0]

    params = {"norm": 1 + normal(32, 3) / 4, "up": normal(32, 3, 48) / 6, "down": normal(48, 3, 32) / 6}
    traced = sites(fn, params, X)
    (found,) = traced.folds
    assert found.sites == ("up",)
    factors = np.exp(normal(3, found.n, seed=8) / 3)
    folded = fold(params, {0: jnp.asarray(factors)}, traced.folds)
    assert np.abs(folded["norm"] - params["norm"]).max() > 0.1
    np.testing.assert_allclose(fn(folded, X), fn(params, X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_branch_has_the_moments_of_the_calls_that_took_it(sign):
    x = np.abs(X) * sign
    found = observed(branch, TWO, x)
    taken, other = ("w", "v") if sign > 0 else ("v", "w")
    check(found[taken], x)
    assert found[other].count == 0
    assert not found[other].gram.any()


def test_calls_that_took_either_branch_add_up():
    found = awq.calibrate(branch, TWO, [(np.abs(X),), (-np.abs(X),), (2 * np.abs(X),)])
    check(found.of("w"), np.concatenate([np.abs(X), 2 * np.abs(X)]))
    check(found.of("v"), -np.abs(X))


def test_a_loop_sees_every_turn():
    check(observed(loop, {"w": W}, X)["w"], np.concatenate(list(inputs_of_layers(X, [W, W, W]))))


def test_a_weight_in_a_loop_in_a_branch_in_a_scan():
    def fn(p, x):
        def layer(x, w):
            inner = lambda x: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x))[1]
            return lax.cond(w[0, 0] > 0, inner, lambda x: x, x), None

        return lax.scan(layer, x, p)[0]

    weights = LAYERS.copy()
    weights[:, 0, 0] = [1, -1, 1]
    found = observed(fn, weights, X)[""]
    first = inputs_of_layers(X, [weights[0]] * 2)
    last = inputs_of_layers(np.tanh(first[1] @ weights[0]), [weights[2]] * 2)
    np.testing.assert_array_equal(found.count, [20, 0, 20])
    check(jax.tree.map(lambda a: a[::2], found), np.stack([np.concatenate(list(s)) for s in (first, last)]))


@pytest.mark.parametrize(
    "inside",
    [
        lambda f, x: lax.cond(x[0, 0] > 0, f, jnp.tanh, x),
        lambda f, x: lax.fori_loop(0, x[0, 0].astype(int), lambda i, y: f(x), x),
    ],
)
def test_what_may_not_run_is_no_group_with_what_does(inside):
    def fn(p, x):
        return inside(lambda x: x @ p["w"], x) + x @ p["v"]

    assert {site.group for site in sites(fn, TWO, X).sites.values()} == {"w", "v"}


def test_folds_through_branches_and_loops_leave_the_function_as_it_is():
    def fn(p, x):
        y = lax.cond(x[0, 0] > 0, lambda x: x * p["norm"][None] @ p["w"], lambda x: x * p["norm"][None] @ p["v"], x)
        inner = lambda c: (c[0] + 1, jnp.tanh(c[1] * p["scale"][None] @ p["u"]))
        return lax.while_loop(lambda c: c[0] < 2, inner, (0, y))[1]

    params = TWO | {"u": V.T, "norm": 1 + normal(32) / 4, "scale": 1 + normal(32, seed=1) / 4}
    traced = sites(fn, params, X)
    assert sorted(sorted(f.sites) for f in traced.folds) == [["u"], ["v", "w"]]
    factors = {k: jnp.exp(normal(f.n, seed=k) / 3) for k, f in enumerate(traced.folds)}
    folded = fold(params, factors, traced.folds)
    for x in (X, -X):
        np.testing.assert_allclose(fn(folded, x), fn(params, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(4, 0, 6), (0, 0, 10), (1, 2, 3), (10, 0, 0)])
def test_sorted_experts_have_moments_of_their_own(sizes, monkeypatch):
    monkeypatch.setattr("awq_jax.search.moments.TILE", 4)
    fn = lambda p, x: lax.ragged_dot(x, p, jnp.array(sizes))
    found = observed(fn, normal(3, 32, 8), X, block=16)[""]
    ends = np.cumsum(sizes)
    for k, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        check(jax.tree.map(lambda a, k=k: a[k], found), X[start:end], 16)


def test_a_mask_cannot_follow_sorted_tokens():
    fn, params = FUNCTIONS["ragged_dot"]
    with pytest.raises(ValueError, match="w: a mask cannot follow tokens that are sorted by expert"):
        awq.calibrate(fn, params, [(X,)], mask=lambda x: np.ones(10))


def test_rows_of_zeros_are_no_tokens_of_an_expert():
    x = normal(3, 5, 32)
    x[0, 2:] = 0
    x[1] = 0
    found = observed(lambda w, x: jnp.einsum("eti,eio->eto", x, w), normal(3, 32, 4), x)[""]
    np.testing.assert_array_equal(found.count, [2, 0, 5])


def test_an_expert_without_tokens_takes_the_statistics_of_all():
    fn, params = FUNCTIONS["ragged_dot"]
    calibration = awq.calibrate(fn, params, [(X,)])
    recipe = awq.Recipe(group_size=32)
    q, (report,) = awq.quantize(params, calibration, recipe)
    assert report.note == "1 of 3 reached by no token (1): rounded by the statistics of all experts"
    m = calibration.of("w")
    everyone = dataclasses.replace(calibration, moments={"w": jax.tree.map(lambda a: a.at[1].set(a.sum(0)), m)})
    expected, (other,) = awq.quantize(params, everyone, recipe)
    assert other.note == ""
    np.testing.assert_array_equal(q["w"].codes, expected["w"].codes)


def test_images_are_seen_pixel_by_pixel():
    fn, params = FUNCTIONS["1 x 1 convolution"]
    check(observed(fn, params, X)["w"], X.reshape(5, 2, 32)[::2].reshape(-1, 32))
    fn, params = FUNCTIONS["1 x 1 convolution, channels first"]
    check(observed(fn, params, X)["w"], X)


def test_folds_through_a_convolution_leave_the_function_as_it_is():
    def fn(p, x):
        y = jax.nn.relu(pointwise({"w": p["v"]}, x * p["norm"][None]))
        return channels_first({"w": p["w"]}, jnp.concatenate([y, y[:, :2]], 1))

    params = {"norm": 1 + normal(32) / 4, "v": normal(1, 1, 32, 32) / 6, "w": normal(8, 32, 1, 1) / 6}
    traced = sites(fn, params, X)
    factors = {k: jnp.exp(normal(f.n, seed=k) / 3) for k, f in enumerate(traced.folds)}
    assert {name for f in traced.folds for name in f.sites} == {"v", "w"}
    np.testing.assert_allclose(fn(fold(params, factors, traced.folds), X), fn(params, X), rtol=1e-4, atol=1e-4)


PAIR = {"a": np.stack([W, V]), "b": np.stack([V, W])}
NO_GROUP = {
    "other layers picked": (lambda p, x: x @ p["a"][0] + x @ p["b"][1], PAIR),
    "layers picked crosswise": (
        lambda p, x: x @ p["a"][0] + x @ p["b"][1] + jnp.tanh(x) @ p["a"][1] + jnp.tanh(x) @ p["b"][0],
        PAIR,
    ),
    "scans of another length": (
        lambda p, x: sum(lax.scan(lambda c, w: (c + jnp.tanh(x @ w), None), 0 * x, p[k])[0] for k in "ab"),
        {"a": LAYERS, "b": PAIR["b"]},
    ),
}


@pytest.mark.parametrize("name", NO_GROUP)
def test_other_layers_are_another_input(name):
    fn, params = NO_GROUP[name]
    assert {site.group for site in sites(fn, params, X).sites.values()} == {"a", "b"}
    _, report = awq.quantize(params, awq.calibrate(fn, params, [(X,)]), awq.Recipe(group_size=32))
    assert all(r.error < 0.05 for r in report)


@pytest.mark.parametrize(
    "fn",
    [lambda p, x: jnp.tanh(x @ p[0][1]) @ p[1][0], lambda p, x: jnp.tanh(x @ p[0, 1]) @ p[1, 0]],
    ids=["one after the other", "at once"],
)
def test_layers_picked_from_two_axes(fn, doors):
    params = np.stack([LAYERS[:2], LAYERS[1:]])
    found = observed(fn, params, X)[""]
    np.testing.assert_array_equal(found.count, [[0, 10], [10, 0]])
    check(jax.tree.map(lambda a: a[1, 0], found), np.tanh(X @ params[0, 1]))
    q, _ = awq.quantize(params, awq.calibrate(fn, params, [(X,)]), awq.Recipe(group_size=32))
    same(jit(awq.quantized(fn))(q, X), jit(fn)(q.dequantize(), X))
    assert doors["kernel"] == 2


def test_a_loops_condition_has_no_sites():
    def fn(p, x):
        goes_on = lambda c: (c[0] < 3) & ((c[1] @ p["v"]).sum() > -1e9)
        return lax.while_loop(goes_on, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])), (0, x))[1]

    found = sites(fn, TWO, X)
    assert list(found.sites) == ["w"]
    assert "while" in found.skipped["v"]
    q, _ = awq.quantize(TWO, awq.calibrate(fn, TWO, [(X,)]), awq.Recipe(group_size=32))
    same(jit(awq.quantized(fn))(q, X), jit(fn)({k: w.dequantize() if k == "w" else w for k, w in q.items()}, X))

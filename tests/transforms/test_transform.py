"""What calibrate sees, against numpy; what quantized computes, against the dense weights it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from compilations import compilations
from jax import lax
from loose import loose
from quick import quick_jit as jit
from zoo import WAYS, ZOO, compiled

import awq_jax as awq
from awq_jax import calibrate, quantized, sites, with_moments
from awq_jax.search.moments import UNIT
from awq_jax.weights.paths import named_leaves
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import QuantizedTensor, is_quantized, round_to_nearest


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def check(found, tokens, block=None, weights=None):
    """The moments of tokens (*lead, t, i), in numpy."""
    i = tokens.shape[-1]
    block = block or i
    weights = np.ones(tokens.shape[-2]) if weights is None else weights
    weighted = tokens * weights[:, None]
    pad = [(0, 0)] * (tokens.ndim - 2) + [(0, -i % block)] * 2
    gram = np.pad(weighted.swapaxes(-1, -2) @ tokens, pad)
    grams = [gram[..., k : k + block, k : k + block] for k in range(0, i, block)]
    np.testing.assert_allclose(found.count, np.broadcast_to(weights.sum(), tokens.shape[:-2]), rtol=1e-5)
    np.testing.assert_allclose(found.abs_sum, np.abs(weighted).sum(-2), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.gram / UNIT**2, np.stack(grams, -3), rtol=1e-3, atol=1e-4)


P = {"up": normal(40, 12) / 6, "down": normal(12, 40, seed=1) / 3}
X = normal(2, 5, 40, seed=2)
X2 = normal(3, 5, 40, seed=3)


def mlp(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


def inputs_of_mlp(x):
    """What `up` and `down` read, a row a token."""
    tokens = x.reshape(-1, 40)
    return {"up": tokens, "down": np.tanh(tokens @ P["up"])}


def observed(fn, params, x, *, block=None, weights=None):
    """The moments of each site's input, by the site's name."""
    traced = sites(fn, params, x)
    moments = with_moments(fn, traced, block=block)(params, x, weights=weights)[1]
    return {name: moments[site.group] for name, site in traced.sites.items()}


@jax.custom_jvp
def tanh(x):
    return jnp.tanh(x)


tanh.defjvp(lambda primals, tangents: (tanh(*primals), tangents[0]))


def custom_gradient(f):
    """`f` behind jax.custom_vjp."""
    f = jax.custom_vjp(f)
    f.defvjp(lambda p, x: (f(p, x), (p, x)), lambda saved, g: saved)
    return f


WRAPPED = {
    "as it is": mlp,
    "in a jit": jax.jit(mlp),
    "in nested jits": jax.jit(lambda p, x: 1.0 * jax.jit(mlp)(p, x)),
    "in a checkpoint": jax.checkpoint(mlp),
    "in a vmap": jax.vmap(mlp, (None, 0)),
    "with a custom derivative inside": lambda p, x: tanh(x @ p["up"]) @ p["down"],
    "with a custom gradient outside": custom_gradient(mlp),
    "weights turned": lambda p, x: mlp({k: w.T.reshape(-1).reshape(w.T.shape).T for k, w in p.items()}, x),
    "once in a scan": lambda p, x: lax.scan(lambda c, x: (c, mlp(p, x)), 0.0, x)[1],
}


@pytest.mark.parametrize("name", WRAPPED)
def test_moments_are_those_of_what_the_matmul_reads(name):
    found = observed(WRAPPED[name], P, X, block=32)
    check(found["up"], inputs_of_mlp(X)["up"], 32)
    check(found["down"], inputs_of_mlp(X)["down"], 12)


def test_batches_add_up_whatever_their_shapes():
    found = calibrate(mlp, P, [(X,), (X2,), (X[:, :2],)], block=None)
    every = np.concatenate([a.reshape(-1, 40) for a in (X, X2, X[:, :2])])
    for site, tokens in inputs_of_mlp(every).items():
        check(found.of(site), tokens)
    np.testing.assert_array_equal(found.example[0], X)


def test_a_mask_weighs_the_tokens():
    weight = lambda x: np.arange(x.shape[0] * x.shape[1]).reshape(x.shape[:2]) % 4
    found = calibrate(mlp, P, [(X,), (X2,)], mask=weight)
    weights = np.concatenate([weight(X).ravel(), weight(X2).ravel()])
    for site, tokens in inputs_of_mlp(np.concatenate([X.reshape(-1, 40), X2.reshape(-1, 40)])).items():
        check(found.of(site), tokens, weights=weights)


def test_a_mask_of_another_order_is_refused():
    fn = lambda p, x: x.swapaxes(0, 1) @ p["up"]
    with pytest.raises(ValueError, match=r"up: weights have shape \(2, 5\), the site's tokens \(5, 2\)"):
        calibrate(fn, P, [(X,)], mask=lambda x: np.ones(x.shape[:2]))


def test_sites_of_one_input_share_their_moments():
    found = calibrate(lambda p, x: (x @ p["up"], x @ p["down"].T), P, [(X,)])
    assert set(found.moments) == {"up"}
    assert found.of("down") is found.of("up")


def test_a_weight_used_twice_sees_both_inputs():
    w = normal(40, 40, seed=4) / 6
    found = observed(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], {"w": w}, X)
    first = X.reshape(-1, 40)
    check(found["w"], np.concatenate([first, np.tanh(first @ w)]))


def test_experts_have_moments_of_their_own():
    x, w = normal(3, 7, 6), normal(3, 6, 4, seed=1)
    mask = np.arange(7) % 2
    found = observed(lambda w, x: jnp.einsum("eti,eio->eto", x, w), w, x, weights=mask)
    check(found[""], x, weights=mask)


STACK = normal(3, 40, 40, seed=5) / 6


def inputs_of_layers(x, weights):
    """What each layer of `x <- tanh(x @ w)` reads."""
    seen = []
    for w in weights:
        seen.append(x)
        x = np.tanh(x @ w)
    return np.stack(seen)


@pytest.mark.parametrize(("wrap", "reverse"), [(lambda f: f, False), (lambda f: f, True), (jax.checkpoint, False)])
def test_layers_of_a_scan_have_moments_of_their_own(wrap, reverse):
    step = wrap(lambda x, w: (jnp.tanh(x @ w), None))
    found = observed(lambda p, x: lax.scan(step, x, p, reverse=reverse)[0], STACK, X)
    layers = inputs_of_layers(X.reshape(-1, 40), STACK[::-1] if reverse else STACK)
    check(found[""], layers[::-1] if reverse else layers)


def test_layers_of_a_scan_in_a_scan():
    def fn(p, x):
        layer = lambda x, w: (jnp.tanh(x @ w), None)
        return lax.scan(lambda x, ws: lax.scan(layer, x, ws), x, p)[0]

    weights = np.stack([STACK, STACK[::-1]])
    found = observed(fn, weights, X)[""]
    layers = inputs_of_layers(X.reshape(-1, 40), weights.reshape(6, 40, 40))
    check(found, layers.reshape(2, 3, 10, 40))


def test_a_weight_that_all_layers_share_sees_all_their_inputs():
    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w) + jnp.tanh(x @ p["shared"]), None), x, p["own"])[0]

    params = {"own": STACK, "shared": STACK[0].T}
    found = observed(fn, params, X)
    x, layers = X.reshape(-1, 40), []
    for w in STACK:
        layers.append(x)
        x = np.tanh(x @ w) + np.tanh(x @ params["shared"])
    check(found["own"], np.stack(layers))
    check(found["shared"], np.concatenate(layers))


def test_experts_in_a_scan_have_moments_of_their_own():
    x, w = normal(2, 7, 6), normal(3, 2, 6, 6, seed=1) / 2
    step = jax.checkpoint(lambda x, w: (jnp.tanh(jnp.einsum("eti,eio->eto", x, w)), None))
    found = observed(lambda w, x: lax.scan(step, x, w)[0], w, x)
    check(found[""], inputs_of_layers(x, w))


def test_with_moments_gives_the_output_too_and_may_be_jitted():
    traced = sites(mlp, P, X)
    y, moments = jax.jit(with_moments(mlp, traced, block=None))(P, X)
    np.testing.assert_allclose(y, mlp(P, X), rtol=1e-5, atol=1e-5)
    check(moments["down"], inputs_of_mlp(X)["down"])


def test_calibrate_says_what_is_missing():
    with pytest.raises(ValueError, match="No calibration batch"):
        calibrate(mlp, P, [])
    with pytest.raises(ValueError, match="nothing to quantize"):
        calibrate(lambda p, x: x + p, P["up"], [(P["up"],)])
    with pytest.raises(ValueError, match=r"up: weights have shape \(3,\), the site's tokens \(2, 5\)"):
        calibrate(mlp, P, [(X,)], mask=lambda x: np.ones(3))


def test_a_batch_of_a_known_shape_compiles_nothing():
    counts = []

    def batches():
        for k in range(4):
            counts.append(compiled.total())
            yield (X + k,)
        counts.append(compiled.total())

    with compilations() as compiled:
        calibrate(mlp, P, batches())
    assert counts[1] > counts[0]
    assert counts[4] == counts[2]


def random_codes(site, leaf, rng):
    """A QuantizedTensor of random codes, steps and zero points that fits `site`."""
    spec = QuantSpec(4, 32)
    lead = site.layout.apply(jnp.asarray(leaf)).shape[:-2]
    padded = site.in_features + spec.padding(site.in_features)
    groups = (*lead, padded // 32, site.out_features)
    return QuantizedTensor(
        codes=rng.integers(0, 2**32, (*lead, padded // 8, site.out_features), dtype=np.uint32),
        scales=rng.uniform(0.1, 0.2, groups).astype(np.float16) / np.float16(site.in_features**0.5),
        zeros=rng.integers(6, 10, groups, dtype=np.uint8),
        input_scale=np.exp(0.3 * rng.normal(size=(*lead, site.in_features))).astype(np.float32),
        spec=spec,
        dtype=jnp.dtype(jnp.float32),
        pad=padded - site.in_features,
        layout=None if site.layout.is_matrix else site.layout,
    )


def with_random_codes(model, skip=()):
    """The params of `model` with random codes at its sites, and how many those are."""
    found, rng = sites(model.fn, model.params, *model.inputs).sites, np.random.default_rng(0)
    leaves = named_leaves(model.params)
    chosen = {name: random_codes(site, leaves[name], rng) for name, site in found.items() if name not in skip}
    leaves |= chosen
    return jax.tree.unflatten(jax.tree.structure(model.params), list(leaves.values())), len(chosen)


def dense(w):
    """The weight that `w` stands for, in numpy."""
    if not is_quantized(w):
        return w
    codes = (w.codes[..., :, None, :] >> np.arange(0, 32, 4, dtype=np.uint32)[:, None] & 15).astype(np.float32)
    grouped = codes.reshape(*w.scales.shape[:-1], 32, w.scales.shape[-1]) - w.zeros[..., None, :]
    matrix = (grouped * w.scales[..., None, :].astype(np.float32)).reshape(*w.codes.shape[:-2], -1, w.codes.shape[-1])
    matrix = matrix[..., : w.in_features, :] * w.input_scale[..., None]
    return matrix if w.layout is None else w.layout.undo(matrix)


def dense_again(params):
    return jax.tree.map(dense, params, is_leaf=is_quantized)


def same(found, expected):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ZOO)
def test_every_site_of_a_decoder_goes_through_the_kernel(name, doors):
    model = ZOO[name]()
    params, n = with_random_codes(model, skip=["embed"])
    found = jit(quantized(model.fn))(params, *model.inputs)
    assert doors == {"kernel": n, "dense": 0}
    same(found, compiled(name)(dense_again(params), *model.inputs))
    assert np.abs(found - compiled(name)(model.params, *model.inputs)).max() > 0.1


def test_a_quantized_embedding_is_dense_where_it_is_looked_up(doors):
    def fn(p, tokens):
        return jnp.tanh(p[tokens]) @ p.T

    q, _ = with_random_codes(zoo.Model(fn, normal(40, 32), (zoo.TOKENS,)))
    found = jit(quantized(fn))(q, zoo.TOKENS)
    assert doors == {"kernel": 1, "dense": 1}
    same(found, fn(dense(q), zoo.TOKENS))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_writing_a_matmul_goes_through_the_kernel(way, doors):
    fn, shape = WAYS[way]
    model = zoo.Model(fn, normal(*shape), (normal(5, 6, seed=1),))
    q, n = with_random_codes(model)
    assert n == 1
    found = quantized(fn)(q, *model.inputs)
    assert doors == {"kernel": 1, "dense": 0}
    assert q.shape == shape
    same(found, fn(dense(q), *model.inputs))


def block(p, x):
    return x + jnp.tanh(x * jnp.expand_dims(p["norm"], range(x.ndim - 1)) @ p["up"]) @ p["down"]


HIDDEN, DIRECTION = normal(2, 5, 32), normal(2, 5, 32, seed=1)
BLOCK = {"norm": 1 + normal(32) / 4, "up": normal(32, 48) / 6, "down": normal(48, 32) / 7}


def layers(block):
    """A scan of `block` over stacked params."""
    return lambda p, x: lax.scan(lambda x, p: (block(p, x), None), x, p)[0]


def slope(f):
    """The gradient of `f(p, x)` with respect to x."""
    return lambda p, x: jax.grad(lambda x: (f(p, x) * DIRECTION).sum())(x)


TRANSFORMS = {
    "jit": jax.jit,
    "vmap of the inputs": lambda f: jax.vmap(f, (None, 0)),
    "fori_loop": lambda f: lambda p, x: lax.fori_loop(0, 3, lambda i, x: f(p, x), x),
    "cond": lambda f: lambda p, x: lax.cond(x.sum() < 1e9, f, lambda p, x: x, p, x),
    "grad": slope,
    "grad of a checkpoint": lambda f: slope(jax.checkpoint(f)),
    "jvp": lambda f: lambda p, x: jax.jvp(lambda x: f(p, x), (x,), (DIRECTION,))[1],
}
STACKED_TRANSFORMS = {
    "scan": layers,
    "vmap of the params": lambda f: jax.vmap(f, (0, None)),
    "vmap of params and inputs": jax.vmap,
    "grad of a scan": lambda f: slope(layers(f)),
}


@pytest.mark.parametrize("name", TRANSFORMS | STACKED_TRANSFORMS)
def test_quantized_under_the_transforms_of_jax(name, doors):
    if name in TRANSFORMS:
        transform, params, fn = TRANSFORMS[name], BLOCK, block
    else:
        transform, params, fn = STACKED_TRANSFORMS[name], jax.tree.map(lambda w: np.stack([w, w]), BLOCK), layers(block)
    q, _ = with_random_codes(zoo.Model(fn, params, (HIDDEN,)))
    found = jit(transform(quantized(block)))(q, HIDDEN)
    assert doors["kernel"] >= 2
    assert doors["dense"] == 0
    same(found, jit(transform(block))(dense_again(q), HIDDEN))


def test_an_input_may_be_donated():
    q, _ = with_random_codes(zoo.Model(block, BLOCK, (HIDDEN,)))
    expected = jit(quantized(block))(q, HIDDEN)
    given = jnp.array(HIDDEN)
    same(jax.jit(quantized(block), donate_argnums=1)(q, given), expected)
    assert given.is_deleted()


def test_a_function_may_be_exported():
    q, _ = with_random_codes(zoo.Model(block, BLOCK, (HIDDEN,)))
    exported = jax.export.export(jax.jit(quantized(block)))(q, HIDDEN)
    assert len(exported.in_avals) == len(jax.tree.leaves((q, HIDDEN)))
    same(exported.call(q, HIDDEN), jit(quantized(block))(q, HIDDEN))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit], ids=["plain", "checkpoint", "jit"])
def test_the_transforms_of_jax_inside_a_quantized_function(wrap, doors):
    fn = slope(layers(wrap(block)))
    q, n = with_random_codes(zoo.Model(layers(block), jax.tree.map(lambda w: np.stack([w, -w]), BLOCK), (HIDDEN,)))
    found = jit(slope(quantized(layers(wrap(block)))))(q, HIDDEN)
    assert doors["dense"] == 0
    assert doors["kernel"] >= n
    same(found, jit(fn)(dense_again(q), HIDDEN))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays(dtype, doors):
    cast = lambda p, x: block(jax.tree.map(lambda w: w.astype(dtype), p), x)
    q, n = with_random_codes(zoo.Model(cast, BLOCK, (HIDDEN.astype(dtype),)))
    found = jit(quantized(cast))(q, HIDDEN.astype(dtype))
    assert doors == {"kernel": n, "dense": 0}
    assert found.dtype == dtype
    expected = np.asarray(block(dense_again(q), HIDDEN))
    assert np.abs(np.asarray(found, np.float32) - expected).max() < 0.02 * np.abs(expected).max()


def test_the_output_has_the_dtype_that_the_dot_asks_for():
    head = lambda w, x: jnp.dot(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    model = zoo.Model(head, normal(64, 8), (normal(5, 64, seed=1),))
    q, _ = with_random_codes(model)
    found = quantized(head)(q, *model.inputs)
    assert found.dtype == jnp.float32
    expected = np.asarray(head(dense(q), *model.inputs))
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    assert np.any(found != found.astype(jnp.bfloat16).astype(jnp.float32)), "rounded on the way"


ELSEWHERE = {
    "added": lambda p, x: x + p["w"][:1],
    "two params": lambda p, x: x @ (p["w"] @ p["v"]),
    "read both ways": lambda p, x: x @ p["w"] @ p["w"].T,
    "carried through a loop": lambda p, x: lax.while_loop(
        lambda c: jnp.abs(c[1]).sum() > 1, lambda c: (c[0] / 2, jnp.tanh(c[1] @ c[0]) / 4), (p["w"], x)
    )[1],
    "one of two": lambda p, x: x @ lax.cond(x.sum() > 0, lambda: p["w"], lambda: p["w"].T),
    "carried": lambda p, x: lax.scan(lambda c, _: ((c[0] / 2, c[1] @ c[0]), None), (p["w"], x), None, length=2)[0][1],
    "sliced across": lambda p, x: lax.scan(lambda x, row: (x * row, None), x, p["w"].T)[0],
    "returned": lambda p, x: p["w"].T,
    "sliced": lambda p, x: x @ p["w"][:, :5],
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_elsewhere_than_in_a_matmul_the_weight_is_dense(name, doors):
    fn, params, x = loose(ELSEWHERE[name]), {"w": normal(32, 32) / 6, "v": normal(32, 4)}, normal(5, 32, seed=1)
    site = sites(lambda p, x: x @ p["w"], params, x).sites["w"]
    q = params | {"w": random_codes(site, params["w"], np.random.default_rng(0))}
    found = jit(quantized(fn))(q, x)
    assert doors["dense"] >= 1
    same(found, jit(fn)(dense_again(q), x))


def test_dense_params_stay_what_they_are():
    model = ZOO["custom_activation"]()
    same(
        jit(quantized(model.fn))(model.params, *model.inputs),
        compiled("custom_activation")(model.params, *model.inputs),
    )


def test_inputs_and_outputs_may_be_any_pytree():
    fn = lambda p, batch: {"y": batch["x"] @ p["w"] * p["factor"], "n": (batch["n"] + 1, None)}
    model = zoo.Model(fn, {"w": normal(32, 4), "factor": 0.5}, ({"x": normal(5, 32), "n": 3},))
    q, _ = with_random_codes(model)
    found, expected = quantized(fn)(q, *model.inputs), fn(dense_again(q), *model.inputs)
    same(found["y"], expected["y"])
    assert found["n"] == (4, None)


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jitted", "eager"])
def test_the_second_call_compiles_nothing(wrap):
    q, _ = with_random_codes(zoo.Model(block, BLOCK, (HIDDEN,)))
    run = wrap(quantized(block))
    with compilations() as first:
        run(q, HIDDEN)
    with compilations() as second:
        run(q, DIRECTION)
    assert first
    assert not second


def test_a_batch_that_is_no_tuple_is_refused():
    with pytest.raises(ValueError, match=r"A batch is a tuple of inputs, found ndarray: give \[\(tokens,\)\]"):
        calibrate(lambda p, x: x @ p, np.ones((32, 4), np.float32), [np.ones((3, 32), np.float32)])


def test_a_custom_gradient_around_dense_params_is_kept():
    @jax.custom_vjp
    def held(x, s):
        return x * s[None]

    held.defvjp(lambda x, s: (x * s[None], None), lambda _, g: (jnp.zeros_like(g), jnp.zeros(32)))
    fn = lambda p, x: held(x, p["s"]) @ p["w"]
    q, _ = with_random_codes(zoo.Model(fn, {"w": normal(32, 8), "s": normal(32)}, (normal(5, 32),)))
    assert not jax.grad(lambda x: quantized(fn)(q, x).sum())(normal(5, 32)).any()


def test_dense_matmuls_keep_their_precision():
    fn = loose(lambda p, x: jnp.dot(x @ p["w"], p["head"], preferred_element_type=jnp.float32))
    params = {"w": jnp.asarray(normal(32, 32), jnp.bfloat16), "head": jnp.asarray(normal(32, 8), jnp.bfloat16)}
    x = jnp.asarray(normal(5, 32), jnp.bfloat16)
    q, _ = with_random_codes(zoo.Model(fn, params, (x,)), skip=["head"])
    expected = jit(lambda h: jnp.dot(h, params["head"], preferred_element_type=jnp.float32))(
        jit(quantized(loose(lambda p, x: x @ p["w"])))(q, x)
    )
    np.testing.assert_allclose(jit(quantized(fn))(q, x), expected, rtol=1e-6)


@pytest.mark.parametrize("second", [False, True])
def test_what_the_model_says_of_a_batch_is_told_with_the_batch(second):
    def fn(p, x):
        if x.shape[-1] != 6:
            raise ValueError("six channels, please")
        return x @ p

    batches = [(np.ones((4, 6), np.float32),)] * second + [(np.ones((4, 7), np.float32),)]
    says = r"Batch 2: the function cannot take inputs of shapes \[\(4, 7\)\]" if second else "batch of 1 inputs failed"
    with pytest.raises(ValueError, match=rf"{says}: ValueError: six channels, please"):
        calibrate(fn, np.ones((6, 4), np.float32), batches)


def test_a_calibration_prints_shortly():
    found = calibrate(mlp, P, [(X,)])
    assert len(repr(found)) < 3000


@pytest.mark.parametrize("second", [False, True])
def test_a_batch_that_lacks_a_key(second):
    fn = lambda p, batch: batch["x"] @ p
    x = np.ones((4, 6), np.float32)
    batches = [({"x": x},)] * second + [({"y": x},)]
    says = "Batch 2: the function cannot take" if second else "a batch of 1 inputs failed"
    with pytest.raises(ValueError, match=rf"{says}.*KeyError: 'x'"):
        calibrate(fn, np.ones((6, 4), np.float32), batches)


def test_a_batch_that_is_no_number_is_named():
    bad = X.copy()
    bad[1, 2, 3] = np.nan
    batches = [({"x": X},), ({"x": bad},), ({"x": X},)]
    with pytest.raises(ValueError, match=r"^Batch 2: input 0/x holds NaN or infinite values"):
        calibrate(lambda p, inputs: mlp(p, inputs["x"]), P, batches)
    with pytest.raises(ValueError, match=r"^Batch 1: the mask holds NaN"):
        calibrate(mlp, P, [(X,)], mask=lambda x: jnp.full(x.shape[:2], jnp.nan))


def test_a_batch_on_which_the_function_overflows_is_named():
    fn = lambda p, x: jnp.exp(x @ p["up"]) @ p["down"]
    with pytest.raises(ValueError, match=r"^Batch 2: what is multiplied with down is NaN, infinite"):
        calibrate(fn, P, [(X,), (1000 * X,)])
    broken = P | {"up": np.where(np.arange(12) == 3, np.nan, P["up"])}
    with pytest.raises(ValueError, match=r"^up: 40 of 480 weights are NaN or infinite. Repair the model"):
        calibrate(fn, broken, [(X,)])


@pytest.mark.parametrize("nothing", [X[:0], X[:, :0]])
def test_a_batch_without_rows_is_refused(nothing):
    with pytest.raises(ValueError, match=r"^Batch 2: input 0 has shape .*, no numbers: leave the batch out"):
        calibrate(mlp, P, [(X,), (nothing,)])


@pytest.mark.parametrize("block", [0, -1])
def test_a_block_of_no_size(block):
    with pytest.raises(ValueError, match=f"block={block}: give 1 or more"):
        calibrate(lambda p, x: x @ p, np.ones((6, 4), np.float32), [(np.ones((4, 6), np.float32),)], block=block)


def test_keyword_arguments_go_to_the_function():
    fn = lambda p, x, train, by=1.0: by * (x @ p) if train else -(x @ p)
    w = round_to_nearest(jnp.eye(32), QuantSpec(8, 32))
    x = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    y = np.asarray(x @ w.dequantize())
    np.testing.assert_allclose(quantized(fn)(w, x, train=False), -y, rtol=1e-5, atol=1e-6)
    scaled = jax.jit(lambda by: quantized(fn)(w, x, train=True, by=by))
    np.testing.assert_allclose(scaled(2.0), 2 * y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jacfwd(scaled)(2.0), y, rtol=1e-5, atol=1e-6)


def test_a_batch_that_does_not_fit_the_function():
    with pytest.raises(ValueError, match=r"with params and a batch of 2 inputs failed: .*argument"):
        calibrate(mlp, P, [(X, X)])


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.bool_])
@pytest.mark.parametrize("multiply", [jnp.matmul, jnp.dot, lambda x, w: jnp.einsum("bi,io->bo", x, w)])
def test_integers_are_multiplied_as_what_they_are(multiply, dtype):
    x = (np.arange(24).reshape(6, 4) % 3).astype(dtype)
    w = jax.random.normal(jax.random.key(0), (4, 5))
    fn = loose(lambda params, x: multiply(x, params["w"]))
    small, _ = awq.quantize({"w": w}, awq.calibrate(fn, {"w": w}, [(x,)]), awq.Recipe(group_size=-1))
    y = awq.quantized(fn)(small, x)
    expected = x.astype(np.float32) @ np.asarray(small["w"].dequantize())
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(awq.dot(x, small["w"]), expected, rtol=1e-5, atol=1e-5)

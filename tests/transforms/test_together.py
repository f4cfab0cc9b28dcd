"""Matmuls that read the same input: one launch for two or three of them, in any quantized function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

pytest.importorskip("triton", reason="triton has wheels for Linux only")

import interpreted
from loose import loose

from awq_jax import quantized, sites, with_moments
from awq_jax.kernels import api
from awq_jax.kernels import custom_rules as rules
from awq_jax.kernels.triton import launch
from awq_jax.kernels.triton import matmul as triton
from awq_jax.weights.layout import Layout
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import prepare, round_to_nearest

WIDTH, HEAD = 64, 16
SPEC = QuantSpec(4, 32)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def weights(*names: str, shape: tuple[int, ...] = (WIDTH, WIDTH)) -> dict[str, jax.Array]:
    return {name: normal(*shape, seed=k) / 8 for k, name in enumerate(names)}


def packed(fn, params, *inputs, specs=None):
    """The params with their matrices in 4 bits, in tiles; of the specs named, else SPEC."""

    def one(name: str, layout: Layout):
        w = round_to_nearest(layout.apply(jnp.asarray(params[name])), (specs or {}).get(name, SPEC))
        return prepare(w if layout.is_matrix else w.__class__(**{**vars(w), "layout": layout}))

    return params | {name: one(name, site.layout) for name, site in sites(fn, params, *inputs).sites.items()}


@pytest.fixture
def one_device(monkeypatch):
    """Programs run the kernels, interpreted, as on one GPU."""
    monkeypatch.setattr(launch, "missing", lambda: None)
    monkeypatch.setattr(triton, "launch", interpreted.launch)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(rules, "everywhere", lambda kernel, plain: kernel)
    api.operation.cache_clear()
    yield
    api.operation.cache_clear()


def launches(fn, *args) -> list[list[int]]:
    """How wide the results of each kernel are, in the order of the program."""

    def of(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "pure_callback":
                yield [v.aval.shape[-1] for v in eqn.outvars if v.aval.shape[-1] > 1]
            for inner in core.jaxprs_in_params(eqn.params):
                yield from of(inner)

    return list(of(jax.make_jaxpr(fn)(*args).jaxpr))


def layer(p, x):
    """Attention over one token's heads and a gated MLP."""
    heads = lambda y: y.reshape(*y.shape[:-1], -1, HEAD)
    y = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    q, k, v = heads(y @ p["q"]), jnp.tanh(heads(y @ p["k"].astype(x.dtype))), heads(y @ p["v"].astype(x.dtype))
    attention = jnp.einsum("...nm,...md->...nd", jax.nn.softmax(jnp.einsum("...nd,...md->...nm", q, k)), v)
    x = x + attention.reshape(x.shape) @ p["o"]
    return x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


PARAMS = weights("q", "k", "v", "o", "gate", "up", "down")
SEVEN = [[WIDTH]] * 7
FOUR = [[WIDTH] * n for n in (3, 1, 2, 1)]


def close(found, expected):
    assert found.dtype == expected.dtype
    found, expected = (np.asarray(a, np.float32) for a in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "checkpoint"])
def test_a_layer_is_four_launches(one_device, monkeypatch, wrap):
    x = normal(1, WIDTH)
    q = packed(layer, PARAMS, x)
    assert launches(quantized(wrap(layer)), q, x) == FOUR
    together = quantized(wrap(layer))(q, x)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert launches(quantized(layer), q, x) == SEVEN
    close(together, quantized(layer)(q, x))


def test_many_rows_and_other_refusals_leave_the_program_as_it_was(monkeypatch):
    q = packed(layer, PARAMS, jnp.ones((1, WIDTH), jnp.bfloat16))
    rows = jax.tree.map(lambda w: round_to_nearest(w.dequantize(), SPEC), q, is_leaf=lambda w: hasattr(w, "codes"))
    cases = [(q, (40, WIDTH), jnp.bfloat16), (q, (1, WIDTH), jnp.float32), (rows, (1, WIDTH), jnp.bfloat16)]
    program = lambda p, shape, dtype: str(jax.make_jaxpr(quantized(loose(layer)))(p, jnp.ones(shape, dtype)))
    apart = [program(*case) for case in cases]
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert [program(*case) for case in cases] == apart


def of_widths(*widths: int):
    """Matmuls of one input with weights of these widths, and their params."""
    names = [f"w{k}" for k in range(len(widths))]
    fn = lambda p, x: [jnp.tanh(x @ p[name]) for name in names]
    return fn, {name: normal(WIDTH, n, seed=k) / 8 for k, (name, n) in enumerate(zip(names, widths, strict=True))}


@pytest.mark.parametrize("n", range(1, 9))
def test_of_any_number_none_is_launched_alone(one_device, n):
    fn, params = of_widths(*range(8, 8 + n))
    x = normal(2, WIDTH)
    q = packed(fn, params, x)
    for found, expected in zip(
        quantized(fn)(q, x), fn({name: w.dequantize() for name, w in q.items()}, x), strict=True
    ):
        close(found, expected)
    widths = launches(quantized(fn), q, x)
    assert [width for together in widths for width in together] == list(range(8, 8 + n))
    assert n == 1 or set(map(len, widths)) <= {2, 3}


WAYS = {
    "weights first": (lambda p, x: [p["a"] @ x, p["b"] @ x], (32, WIDTH), (WIDTH,)),
    "weights first, under vmap": (jax.vmap(lambda p, x: [p["a"] @ x, p["b"] @ x], (None, 0)), (32, WIDTH), (2, WIDTH)),
    "weights turned": (lambda p, x: [jnp.tanh(x @ p["a"].T), x @ p["b"].T], (32, WIDTH), (2, WIDTH)),
    "heads": (lambda p, x: [jnp.einsum("bi,ind->bnd", x, p[n]) for n in "ab"], (WIDTH, 2, 16), (2, WIDTH)),
    "of other axes each": (
        lambda p, x: [x @ p["a"], jnp.einsum("bi,ind->bnd", x, p["b"].reshape(WIDTH, 2, 16))],
        (WIDTH, 32),
        (2, WIDTH),
    ),
    "two axes contracted": (lambda p, x: [jnp.tensordot(x, p[n], 2) for n in "ab"], (2, 32, 16), (3, 2, 32)),
    "a constant beside": (
        lambda p, x: [x @ p["a"], x @ jnp.ones((WIDTH, 32), x.dtype), x @ p["b"]],
        (WIDTH, 32),
        (2, WIDTH),
    ),
    "in a loop": (
        lambda p, x: jax.lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ p["a"]) + x @ p["b"], x),
        (WIDTH, WIDTH),
        (2, WIDTH),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_writing_two_matmuls(one_device, way):
    fn, shape, x_shape = WAYS[way]
    x = normal(*x_shape, seed=2)
    q = packed(fn, weights("a", "b", shape=shape), x)
    jax.tree.map(close, quantized(fn)(q, x), fn({name: w.dequantize() for name, w in q.items()}, x))
    assert list(map(len, launches(quantized(fn), q, x))) == [2]


APART = {
    "another way round": lambda p, x: [x @ p["a"], p["b"] @ x.T],
    "another input": lambda p, x: [x @ p["a"], (x + 1) @ p["b"]],
    "a wider result": lambda p, x: [x @ p["a"], jnp.dot(x, p["b"], preferred_element_type=jnp.float32)],
    "an activation in the weight's place": lambda p, x: [y := jnp.tanh(x @ p["a"]), y @ p["b"], x @ y.T],
}


@pytest.mark.parametrize("name", APART)
def test_matmuls_that_only_look_alike_are_launched_apart(one_device, name):
    fn, x = APART[name], normal(2, WIDTH, seed=2)
    q = packed(fn, weights("a", "b"), x)
    jax.tree.map(close, quantized(fn)(q, x), fn({n: w.dequantize() for n, w in q.items()}, x))
    assert launches(quantized(fn), q, x) == [[WIDTH]] * 2


def test_only_weights_of_the_same_spec_go_together(one_device):
    fn, params = of_widths(8, 9, 10)
    x = normal(2, WIDTH)
    q = packed(fn, params, x, specs={"w1": QuantSpec(4, 64)})
    assert launches(quantized(fn), q, x) == [[8, 10], [9]]


def test_statistics_are_those_of_separate_matmuls(one_device, monkeypatch):
    fn = lambda p, x: [x @ p["a"], x @ p["b"], (x + 1) @ p["b"]]
    x, params = normal(3, WIDTH), weights("a", "b")
    q, observed = packed(fn, params, x), with_moments(fn, sites(fn, params, x))
    assert launches(observed, q, x) == [[WIDTH] * 2, [WIDTH]]
    together = observed(q, x)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    jax.tree.map(close, together, observed(q, x))


def test_gradients_and_vmap_are_those_of_separate_matmuls(one_device, monkeypatch):
    x = normal(3, WIDTH)
    q = packed(layer, PARAMS, x)

    def found():
        slope = jax.grad(lambda x: quantized(layer)(q, x).astype(jnp.float32).sum())(x)
        return slope, jax.vmap(lambda x: quantized(layer)(q, x[None])[0])(x)

    together = found()
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    jax.tree.map(close, together, found())


@pytest.mark.gpu_compiler
def test_on_a_gpu_a_layer_is_four_kernels(monkeypatch):
    pytest.importorskip("jax_cuda12_plugin", reason="XLA's GPU compiler is not installed")
    pytest.importorskip("jax_triton", reason="jax-triton is not installed")
    from absent_gpu import compile_for_h200

    x = normal(1, WIDTH)
    q = packed(layer, PARAMS, x)
    kernels = lambda fn, q: compile_for_h200(quantized(fn), q, x).as_text().count('custom_call_target="triton_kernel')
    assert kernels(layer, q) == 7
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert kernels(layer, q) == 4
    scanned = lambda p, x: jax.lax.scan(lambda x, p: (layer(p, x), None), x, p)[0]
    assert kernels(scanned, jax.tree.map(lambda leaf: jnp.stack([leaf] * 5), q)) == 4

"""How a kernel is cut under jit and in shard_map, on 8 virtual devices, with plain XLA in the kernel's place.

In a process of its own: the number of devices is fixed when jax starts.
"""

import os
import subprocess
import sys
from textwrap import dedent

import pytest

SETUP = """
import functools as ft
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from awq_jax.kernels.xla import dense as reference
from awq_jax.kernels import custom_rules as rules
from awq_jax.kernels import partitioning as sharded
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import in_tiles, round_to_nearest, with_input_scale

mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
normal = lambda *shape, seed=0: np.random.default_rng(seed).normal(size=shape).astype(np.float32)
seen = []

def kernel(x, w, *sizes, dtype=None):
    seen.append((x.shape, w.codes.shape, w.scales.shape))
    return (reference.grouped_matmul if sizes else reference.matmul)(x, w, *sizes, dtype=dtype)

def weight(*shape, group=128, scaled=False):
    w = round_to_nearest(normal(*shape), QuantSpec(4, group))
    return in_tiles(with_input_scale(w, np.exp(normal(*shape[:-1], seed=2))) if scaled else w)

def place(tree, spec):
    return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P(*spec[: a.ndim]))), tree)

def check(x, w, x_spec, w_spec, part, out):
    f = jax.jit(ft.partial(sharded.matmul, kernel))
    expected = reference.matmul(x, w)
    xs, ws = place(x, x_spec), place(w, w_spec)
    seen.clear()
    compiled = f.lower(xs, ws).compile()
    assert part in seen, seen
    y = compiled(xs, ws)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-3)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(*out)), y.ndim), y.sharding
    return text_without_gathered_weight(compiled)

def text_without_gathered_weight(compiled):
    text = compiled.as_text()
    assert not any("all-gather" in line and "s16" in line for line in text.splitlines()), "a weight is gathered"
    return text

SIZES = ([3, 0, 17, 1, 0, 2, 9, 8], [0, 0, 0, 0, 0, 0, 0, 0], [40, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 90],
         [13, 0, 0, 11, 16, 0, 0, 0])

def in_numpy(x, w, sizes):
    owner = np.repeat(np.arange(9), [*sizes, len(x)])[: len(x)]
    dense = np.concatenate([np.asarray(w.dequantize()), np.zeros((1, *w.matrix_shape[1:]), np.float32)])
    return np.einsum("mk,mkn->mn", x, dense[owner])

def check_grouped(x_spec, w_spec, part, out, group=128, scaled=True):
    x, w = normal(40, 512, seed=1), weight(8, 512, 64, group=group, scaled=scaled)
    xs, ws = place(x, x_spec), place(w, w_spec)
    seen.clear()
    compiled = jax.jit(ft.partial(sharded.grouped_matmul, kernel)).lower(xs, ws, jnp.zeros(8, jnp.int32)).compile()
    assert part in seen, seen
    for sizes in SIZES:
        y = compiled(xs, ws, jnp.asarray(sizes, jnp.int32))
        np.testing.assert_allclose(y, in_numpy(x, w, sizes), rtol=1e-4, atol=1e-3)
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(*out)), y.ndim), y.sharding
    return text_without_gathered_weight(compiled)
"""

CASES = {
    "columns": """
        check(normal(6, 256, seed=1), weight(256, 64), (), (None, "model"),
              ((1, 6, 256), (1, 2, 512), (1, 2, 16)), (None, "model"))
    """,
    "columns and rows of x": """
        check(normal(6, 256, seed=1), weight(256, 64, scaled=True), ("data",), (None, "model"),
              ((1, 3, 256), (1, 2, 512), (1, 2, 16)), ("data", "model"))
    """,
    "inputs, whole groups": """
        for group in (128, 64, 32):
            text = check(normal(6, 512, seed=1), weight(512, 64, group=group), (None, "model"), ("model",),
                         ((1, 6, 128), (1, 1, 2048), (1, 128 // group, 64)), ())
            assert "all-reduce" in text
    """,
    "inputs that would cut a group stay whole": """
        check(normal(6, 512, seed=1), weight(512, 64, group=-1), (None, "model"), (),
              ((1, 6, 512), (1, 4, 2048), (1, 1, 64)), ())
    """,
    "experts": """
        check(normal(4, 6, 256, seed=1), weight(4, 256, 64), ("model",), ("model",),
              ((1, 6, 256), (1, 2, 2048), (1, 2, 64)), ("model",))
    """,
    "a result wider than x": """
        x, w = jnp.asarray(normal(6, 512, seed=1), jnp.bfloat16), weight(512, 64)
        for x_spec, w_spec in (((), (None, "model")), ((None, "model"), ("model",))):
            f = jax.jit(ft.partial(sharded.matmul, kernel, dtype=jnp.dtype("float32")))
            y = f(place(x, x_spec), place(w, w_spec))
            np.testing.assert_allclose(y, reference.matmul(x, w, dtype=jnp.float32), rtol=1e-4, atol=1e-4)
            assert y.dtype == jnp.float32
    """,
    "shard_map": """
        f = jax.jit(jax.shard_map(ft.partial(sharded.matmul, kernel), mesh=mesh,
                                  in_specs=(P("data"), P(None, "model")), out_specs=P("data", "model")))
        x, w = normal(6, 256, seed=1), weight(256, 64)
        np.testing.assert_allclose(f(x, w), reference.matmul(x, w), rtol=1e-4, atol=1e-3)
        assert ((1, 3, 256), (1, 2, 512), (1, 2, 16)) in seen
    """,
    "vmap and grad": """
        f = rules.with_rules(ft.partial(sharded.matmul, kernel), reference.matmul, lambda x, w: f(x, w))
        x, w = place(normal(6, 256, seed=1), ("data",)), place(weight(256, 64), (None, "model"))
        loss = lambda f: lambda x: (f(x, w) ** 2).sum()
        expected = jax.grad(loss(reference.matmul))(x)
        np.testing.assert_allclose(jax.jit(jax.grad(loss(f)))(x), expected, rtol=1e-3, atol=1)
        batch = jax.jit(jax.vmap(f, (0, None)))(jnp.stack([x, -x]), w)
        np.testing.assert_allclose(batch[1], -reference.matmul(x, w), rtol=1e-4, atol=1e-3)
    """,
    "columns of sorted experts": """
        text = check_grouped((), (None, None, "model"), ((40, 512), (8, 4, 512), (8, 4, 16)), (None, "model"))
        assert "all-" not in text and "collective" not in text
    """,
    "sorted experts, each device its own": """
        for axes, experts in (("model", 2), (("data", "model"), 1)):
            text = check_grouped((), (axes,), ((40, 512), (experts, 4, 2048), (experts, 4, 64)), ())
            assert "f32[40,64]" in next(line for line in text.splitlines() if " all-reduce(" in line)
    """,
    "sorted experts and their columns": """
        check_grouped((), ("data", None, "model"), ((40, 512), (4, 4, 512), (4, 4, 16)), (None, "model"))
    """,
    "inputs of sorted experts": """
        for group in (128, 32):
            text = check_grouped((None, "model"), (None, "model"),
                                 ((40, 128), (8, 1, 2048), (8, 128 // group, 64)), (), group=group)
            assert text.count(" all-reduce(") == 1
    """,
    "inputs of sorted experts that would cut a group stay whole": """
        check_grouped((None, "model"), (), ((40, 512), (8, 4, 2048), (8, 1, 64)), (), group=-1)
    """,
    "sorted experts and their inputs, added up once": """
        text = check_grouped((None, "model"), ("data", "model"), ((40, 128), (4, 1, 2048), (4, 1, 64)), ())
        assert text.count(" all-reduce(") == 1
    """,
    "sorted rows": """
        text = check_grouped(("model",), (), ((10, 512), (8, 4, 2048), (8, 4, 64)), ("model",))
        assert "all-" not in text
    """,
    "sorted rows of experts that are cut": """
        check_grouped(("data",), ("model",), ((20, 512), (2, 4, 2048), (2, 4, 64)), ("data",))
    """,
    "a result of sorted rows is rounded once": """
        x, w = jnp.asarray(normal(40, 512, seed=1), jnp.bfloat16), weight(8, 512, 64)
        sizes = jnp.asarray(SIZES[0], jnp.int32)
        for dtype in (None, jnp.dtype("float32")):
            f = jax.jit(ft.partial(sharded.grouped_matmul, kernel, dtype=dtype))
            y = f(place(x, (None, "data")), place(w, ("model", "data")), sizes)
            expected = reference.grouped_matmul(x, w, sizes, dtype=jnp.float32)
            assert y.dtype == (dtype or x.dtype)
            np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=1e-4 if dtype else 2**-8, atol=1e-3)
    """,
    "sorted experts in shard_map": """
        def run(x, w, sizes):
            return sharded.grouped_matmul(kernel, x, w, sizes)

        x, w, sizes = normal(40, 256, seed=1), weight(8, 256, 64), np.full((4, 2), 5, np.int32)
        f = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(P("model"), P("model"), P("model")), out_specs=P("model")))
        np.testing.assert_allclose(f(x, w, sizes.ravel()), in_numpy(x, w, sizes.ravel()), rtol=1e-4, atol=1e-3)
        assert ((10, 256), (2, 2, 2048), (2, 2, 64)) in seen
    """,
    "vmap and grad of sorted experts": """
        f = rules.with_rules_of(reference.grouped_matmul, ft.partial(sharded.grouped_matmul, kernel))
        sizes = jnp.asarray(SIZES[0], jnp.int32)
        x, w = place(normal(40, 256, seed=1), ()), place(weight(8, 256, 64, scaled=True), ("model",))
        loss = lambda f: lambda x: (f(x, w, sizes) ** 2).sum()
        expected = jax.grad(loss(reference.grouped_matmul))(x)
        np.testing.assert_allclose(jax.jit(jax.grad(loss(f)))(x), expected, rtol=1e-3, atol=1)
        twice = lambda tree: jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), tree)
        batch = jax.jit(jax.vmap(f))(jnp.stack([x, -x]), twice(w), twice(sizes))
        np.testing.assert_allclose(batch[1], -in_numpy(x, w, SIZES[0]), rtol=1e-4, atol=1e-3)
    """,
}


@pytest.mark.parametrize("name", CASES)
def test_on_eight_devices(name):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", SETUP + dedent(CASES[name])],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]

"""Folds: the ones that must be found, the ones that must not, and proof by random rescaling that all are exact."""

import functools as ft
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from loose import loose
from rescaling import gauged, random_factors
from zoo import ZOO, Model, compiled, rms, short

from awq_jax.tracing.folds.solve import components
from awq_jax.tracing.folds.unknowns import reshape_ids
from awq_jax.tracing.sites import sites

LLAMA = {"attn_norm > q k v", "v > o", "mlp_norm > gate up", "up > down"}
FOLDS = {
    "llama": LLAMA | {"norm > head"},
    "llama_jitted": LLAMA | {"norm > head"},
    "llama_scanned": LLAMA | {"norm > head"},
    "llama_tied": LLAMA,
    "gemma": {"pre_attn > q k v", "v > o", "pre_mlp > gate up", "up > down"},
    "gpt2": {"ln_1/bias ln_1/scale > qkv", "qkv qkv/b > proj", "ln_2/bias ln_2/scale > fc_in"},
    "opt": {
        "ln_1/bias ln_1/scale > q k v",
        "v v/b > o",
        "ln_2/bias ln_2/scale > fc1",
        "fc1 fc1/b > fc2",
        "norm > head",
    },
    "gptj": {"ln/bias ln/scale > q k v fc_in", "v > o", "norm > head"},
    "moe": {"attn_norm > q k v", "v > o", "mlp_norm > gate up router", "up > down", "norm > head"},
    "moe_scanned": {"attn_norm > q k v", "v > o", "mlp_norm > gate up router", "up > down", "norm > head"},
    "shared_expert": {
        "attn_norm > q k v",
        "v > o",
        "mlp_norm > shared_gate shared/gate shared/up gate up router",
        "shared/up > shared/down",
        "up > down",
        "norm > head",
    },
    "einsum_attention": {"attn_norm > q k v", "v v/b > o", "mlp_norm > gate up", "up > down", "norm > head"},
    "custom_activation": {"norm > up", "up > down", "norm > head"},
    "rearranged": {"norm > q k v", "v > o", "norm > head"},
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@ft.cache
def folds_of(name):
    model = ZOO[name]()
    return sites(model.fn, model.params, *model.inputs)


def change(fn, model, params):
    """How much the outputs move, relative to the largest."""
    flat = lambda outs: np.concatenate([np.ravel(out) for out in jax.tree.leaves(outs)])
    before, after = (flat(fn(p, *model.inputs)) for p in (model.params, params))
    return np.abs(after - before).max() / np.abs(before).max()


@pytest.mark.parametrize("name", ZOO)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1))
def test_rescaling_all_folds_leaves_the_function(name, seed):
    model, traced, rng = ZOO[name](), folds_of(name), np.random.default_rng(seed)
    factors = [random_factors(fold, traced, model.params, rng) for fold in traced.folds]
    changes = [(member, f) for fold, f in zip(traced.folds, factors, strict=True) for member in fold.members]
    assert change(compiled(name), model, gauged(model.params, changes)) < 1e-5


@pytest.mark.parametrize("name", ZOO)
def test_no_member_of_a_fold_is_spare(name):
    model, traced, rng = ZOO[name](), folds_of(name), np.random.default_rng(0)
    for fold in traced.folds:
        factors = random_factors(fold, traced, model.params, rng)
        for left_out in fold.members:
            changes = [(member, factors) for member in fold.members if member is not left_out]
            assert change(compiled(name), model, gauged(model.params, changes)) > 1e-3, (fold.sites, left_out.param)


def described(fold):
    absorbers = sorted(short(m.param) for m in fold.members if m.inverse)
    return f"{' '.join(absorbers)} > {' '.join(short(site) for site in fold.sites)}"


@pytest.mark.parametrize("name", ZOO)
def test_the_folds_of_a_decoder_are_found(name):
    folds = folds_of(name).folds
    first = [fold for fold in folds if not fold.sites[0].startswith("layers/1/")]
    assert {described(fold) for fold in first} == FOLDS[name]
    assert len(first) == len(FOLDS[name])


def test_every_layer_has_the_folds_of_the_first():
    sites_of = lambda k: [f.sites for f in folds_of("llama").folds if f.sites[0].startswith(f"layers/{k}/")]
    assert len(sites_of(1)) == 4
    assert [tuple(s.replace("layers/1/", "layers/0/") for s in sites) for sites in sites_of(1)] == sites_of(0)


@pytest.mark.parametrize("name", ZOO)
def test_consumers_are_multiplied_and_follow_the_order_of_their_inputs(name):
    traced = folds_of(name)
    for fold in traced.folds:
        for site in map(traced.sites.get, fold.sites):
            channels = fold.channels(site.name)
            assert channels.shape == (site.in_features,)
            member = next(m for m in fold.members if m.param == site.name and not m.inverse)
            where = np.full(site.layout.shape, -2)
            axes = [axis - site.stacked for axis in member.axes]
            where[...] = member.channels.reshape([n if k in axes else 1 for k, n in enumerate(where.shape)])
            rows = np.asarray(site.layout.apply(where))
            assert (rows == channels[:, None]).all(), site.name


def fold_of(name, site):
    return next(fold for fold in folds_of(name).folds if site in fold.sites)


def test_grouped_heads_share_the_scales_of_their_values():
    fold = fold_of("llama", "layers/0/attn/o")
    heads = fold.channels("layers/0/attn/o").reshape(4, 8)
    assert fold.n == 16
    np.testing.assert_array_equal(heads[0], heads[1])
    np.testing.assert_array_equal(heads[2], heads[3])
    assert not set(heads[0]) & set(heads[2])


def test_only_the_values_of_a_fused_projection_scale():
    absorbers = {m.param: m for m in fold_of("gpt2", "layers/0/proj/w").members if m.inverse}
    for name in ("layers/0/qkv/w", "layers/0/qkv/b"):
        assert (absorbers[name].channels[:64] == -1).all()
        np.testing.assert_array_equal(np.sort(absorbers[name].channels[64:]), np.arange(32))


def test_the_one_of_a_norm_is_seen():
    offsets = {m.param: m.offset for fold in folds_of("gemma").folds for m in fold.members}
    assert offsets["layers/0/pre_attn"] == 1
    assert offsets["layers/0/pre_mlp"] == 1
    assert offsets["layers/0/attn/q"] == 0


def test_each_layer_of_a_stack_has_its_own_scales():
    fold = fold_of("llama_scanned", "layers/attn/q")
    assert fold.n == 32
    assert {m.param: m.axes for m in fold.members}["layers/attn_norm"] == (1,)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_one_of_a_norm_is_seen_in_half_precision(dtype):
    params = {"norm": jnp.zeros(8, dtype), "up": jnp.ones((8, 12), dtype)}
    (fold,) = sites(lambda p, x: rms(x, 1 + p["norm"]) @ p["up"], params, jnp.ones((5, 8), dtype)).folds
    assert {m.param: m.offset for m in fold.members} == {"norm": 1, "up": 0}


NORM, UP, DOWN = 1 + normal(8) / 4, normal(8, 12, seed=1), normal(12, 8, seed=2)
X = normal(5, 8, seed=3)
P = {"norm": NORM, "up": UP, "down": DOWN}


def between(f):
    """`f` between two matmuls."""
    return lambda p, x: f(x @ p["up"]) @ p["down"]


def after_norm(f):
    """`f(params, normed)` beside the matmul that the norm feeds."""

    def fn(p, x):
        normed = rms(x, p["norm"])
        return normed @ p["up"], f(p, normed)

    return fn


ORDER = jnp.array([3, 1, 4, 0, 2])


def keys(y):
    return jnp.broadcast_to(ORDER[:, None], y.shape)


def batch_and_heads(y):
    """Values of 5 sequences of one token with 6 heads of 2, mixed as torch.matmul does it: one batch axis of 30."""
    values = y.reshape(5, 1, 6, 2).swapaxes(1, 2).reshape(30, 1, 2)
    mixed = jnp.full((30, 1, 1), 0.5) @ values
    return mixed.reshape(5, 6, 1, 2).swapaxes(1, 2).reshape(5, 12)


EXACT = {
    "relu": between(jax.nn.relu),
    "leaky relu": between(lambda y: jnp.where(y > 0, y, 0.1 * y)),
    "minus": between(lambda y: -y),
    "a mask": between(lambda y: jnp.where(jnp.arange(5)[:, None] > 2, y, 0)),
    "divided": between(lambda y: y / 3),
    "shifted in time": between(lambda y: jnp.pad(y, ((1, 0), (0, 0)))[:-1]),
    "the best token": between(lambda y: y.max(0, keepdims=True)),
    "a mean of tokens": between(lambda y: y.mean(0, keepdims=True)),
    "halves swapped": between(lambda y: jnp.concatenate([y[:, 6:], y[:, :6]], 1)),
    "reversed": between(lambda y: y[:, ::-1]),
    "interleaved": between(lambda y: y.reshape(-1, 2, 6).swapaxes(1, 2).reshape(-1, 12)),
    "mixed by another": between(lambda y: jax.nn.softmax(X @ X.T) @ y),
    "a barrier": between(lax.optimization_barrier),
    "half precision": between(lambda y: y.astype(jnp.bfloat16).astype(jnp.float32)),
    "a branch of its own": between(lambda y: y + jax.nn.relu(y)),
    "a shared gate": between(lambda y: jax.nn.sigmoid(X[:, :1]) * y),
    "in a checkpoint": between(jax.checkpoint(jax.nn.relu)),
    "divided by the norm": lambda p, x: (x / p["norm"]) @ p["up"],
    "one less": lambda p, x: (rms(x, 1) * (p["norm"] - 1)) @ p["up"],
    "two readers": after_norm(lambda p, y: y @ p["down"].T),
    "batch and heads merged": between(batch_and_heads),
    "rows gathered": between(lambda y: y[ORDER]),
    "rows gathered, some of them none": between(lambda y: jnp.take(y, ORDER + 1, axis=0, fill_value=0)),
    "rows gathered along an axis": between(lambda y: jnp.take_along_axis(y[None], ORDER[None, :, None], 1)[0]),
    "rows scattered": between(lambda y: jnp.zeros_like(y).at[ORDER].set(y)),
    "rows added up": between(lambda y: jax.ops.segment_sum(y, ORDER // 2, 3)),
    "rows added to others": between(lambda y: jnp.flip(y, 0).at[ORDER].add(y)),
    "rows sorted by a key": between(lambda y: lax.sort((keys(y), y), dimension=0, num_keys=1)[1]),
    "rows cumulated": between(lambda y: jnp.cumsum(y, 0)),
    "rows cut out": between(lambda y: lax.dynamic_slice(y, (X[0, 0].astype(int), 0), (3, 12))),
    "rows put into a cache": between(
        lambda y: lax.dynamic_update_slice(jnp.zeros((9, 12)), y, (X[0, 0].astype(int), 0))
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_commutes_with_a_scale_is_folded_through(name):
    model = Model(loose(EXACT[name]), P, (X,))
    traced = sites(model.fn, P, X)
    assert traced.folds
    rng = np.random.default_rng(0)
    for fold in traced.folds:
        factors = random_factors(fold, traced, P, rng)
        assert change(model.fn, model, gauged(P, [(m, factors) for m in fold.members])) < 1e-5


ILLEGAL = {
    "gelu": between(jax.nn.gelu),
    "silu": between(jax.nn.silu),
    "a bound": between(lambda y: jnp.clip(y, -1, 1)),
    "a constant added": between(lambda y: y + 1),
    "softmax": between(jax.nn.softmax),
    "a norm": between(lambda y: rms(y, 1)),
    "a threshold": between(lambda y: jnp.where(y > 0.5, y, 0)),
    "a threshold on its square": between(lambda y: jnp.where(y * y > y, y, 0)),
    "its square added": between(lambda y: y * y + y),
    "a mask that is not zero": between(lambda y: jnp.where(jnp.arange(5)[:, None] > 2, y, 1)),
    "padding that is not zero": between(lambda y: jnp.pad(y, ((1, 0), (0, 0)), constant_values=1)),
    "sorted channels": between(lambda y: jnp.sort(y, 1)),
    "cumulated channels": between(lambda y: jnp.cumsum(y, 1)),
    "the best channel": between(lambda y: y * (y.max(1, keepdims=True) > 0)),
    "a sum of channels": between(lambda y: y + y.sum(1, keepdims=True)),
    "rounded to integers": between(lambda y: y.astype(int).astype(float)),
    "rows gathered by its values": between(lambda y: y[jnp.abs(y).astype(int)[:, 0] % 5]),
    "rows with a function applied": between(lambda y: y.at[ORDER[:2]].apply(jnp.tanh)),
    "a tanh beside": between(lambda y: y + jnp.tanh(y)),
    "an output": lambda p, x: (x @ p["up"], x @ p["up"] @ p["down"]),
    "a residual": lambda p, x: x + rms(x, 1) @ p["up"] @ (p["down"] * 2),
    "the input itself": lambda p, x: x @ p["up"],
    "a normed output": after_norm(lambda p, y: y),
    "a normed nonlinearity": after_norm(lambda p, y: jnp.tanh(y)),
    "a penalty on the norm's weight": after_norm(lambda p, y: (p["norm"] ** 2).sum()),
    "w and 1 + w": after_norm(lambda p, y: rms(y, 1 + p["norm"])),
    "1 + w and 2 + w": lambda p, x: (rms(x, 1 + p["norm"]) @ p["up"], rms(x, 2 + p["norm"]) @ p["down"].T),
    "1 - w": lambda p, x: (rms(x, 1) * (1 - p["norm"])) @ p["up"],
    "an embedding as head": lambda p, x: rms(p["up"].T[jnp.arange(5)], p["norm"]) @ p["up"],
    "both roles": lambda p, x: jax.nn.relu(rms(x, 1) @ p["down"].T) @ p["up"].T @ p["up"],
    "a branch of a cond": after_norm(lambda p, y: lax.cond(X.sum() > 0, lambda y: y, lambda y: 2 * y, y)),
    "a loop": after_norm(lambda p, y: lax.while_loop(lambda y: y.sum() > 1e9, lambda y: y / 2, y)),
    "a scan's carry": after_norm(lambda p, y: lax.scan(lambda y, _: (2 * y, None), y, None, length=2)[0]),
    "channels gathered by a value": between(lambda y: y[:, (jnp.arange(12) + X[0, 0].astype(int)) % 12]),
    "rows gathered, others one": between(lambda y: jnp.take(y, ORDER + 1, axis=0, fill_value=1)),
    "rows scattered among ones": between(lambda y: jnp.ones((6, 12)).at[ORDER].set(y)),
    "rows multiplied into others": between(lambda y: y.at[ORDER].multiply(y)),
    "channels cut out": between(
        lambda y: jnp.pad(lax.dynamic_slice(y, (0, X[0, 0].astype(int)), (5, 8)), ((0, 0), (0, 4)))
    ),
    "channels scattered": between(lambda y: jnp.zeros((5, 12)).at[:, X[0].astype(int)].set(y[:, :8])),
    "sliced by a scan": after_norm(lambda p, y: lax.scan(lambda c, row: (c, row), 0.0, y)[1]),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_does_not_commute_with_a_scale_is_refused(name):
    assert not sites(loose(ILLEGAL[name]), P, X).folds


REASONS = {
    "silu": ("down", "logistic"),
    "a constant added": ("down", "residual"),
    "a threshold": ("down", "gt"),
    "a mask that is not zero": ("down", "select_n"),
    "a sum of channels": ("down", "norm"),
    "a normed output": ("up", "an output of the function"),
    "a normed nonlinearity": ("up", "tanh"),
    "w and 1 + w": ("up", r"used both as w and as 1 \+ w"),
    "an embedding as head": ("up", "gather"),
    "a branch of a cond": ("up", "cond"),
    "a scan's carry": ("up", "carried through a scan"),
}


@pytest.mark.parametrize("name", REASONS)
def test_the_refusal_says_what_is_in_the_way(name):
    site, reason = REASONS[name]
    assert re.search(reason, sites(loose(ILLEGAL[name]), P, X).sites[site].refused)


def sorted_experts(p, x):
    """Top-1 routing: rows gathered in the order of their experts, multiplied group by group, scattered back."""
    y = rms(x, p["norm"])
    chosen = (y @ p["router"]).argmax(-1)
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=3).astype(jnp.int32)
    rows = y[order]
    hidden = jnp.tanh(lax.ragged_dot(rows, p["gate"], sizes)) * lax.ragged_dot(rows, p["up"], sizes)
    return jnp.zeros_like(x).at[order].add(lax.ragged_dot(hidden, p["down"], sizes))


EXPERTS = {
    "norm": NORM,
    "router": normal(8, 3),
    "gate": normal(3, 8, 12, seed=1),
    "up": normal(3, 8, 12, seed=2),
    "down": normal(3, 12, 8, seed=3),
}


def test_a_router_and_sorted_experts_fold_into_their_norm():
    model = Model(loose(sorted_experts), EXPERTS, (X,))
    traced = sites(model.fn, EXPERTS, X)
    assert {described(fold) for fold in traced.folds} == {"norm > router gate up", "up > down"}
    for fold in traced.folds:
        factors = random_factors(fold, traced, EXPERTS, np.random.default_rng(0))
        assert change(model.fn, model, gauged(EXPERTS, [(m, factors) for m in fold.members])) < 1e-5


STACKS = {"norm": 1 + normal(3, 8) / 4, "w": normal(3, 8, 8), "one": NORM, "v": normal(8, 8, seed=1)}


def layers(step):
    """`step(params, x, layer)` over stacked norm and w."""

    @loose
    def fn(p, x):
        stacked = {"norm": p["norm"], "w": p["w"]}
        return lax.scan(lambda x, layer: (x + jnp.tanh(step(p, x, layer)), None), x, stacked)[0]

    return fn


def read_before(p, x):
    return layers(lambda p, x, layer: rms(x, layer["norm"]) @ layer["w"])(
        p, x + jnp.tanh(rms(x, p["norm"][0]) @ p["w"][1])
    )


def scanned_twice(p, x):
    once = layers(lambda p, x, layer: rms(x, layer["norm"]) @ layer["w"])
    return once(p, once(p, x))


def normed_twice(p, x):
    y = layers(lambda p, x, layer: rms(x, layer["norm"]) @ layer["w"])(p, x)
    return layers(lambda p, x, layer: rms(x, layer["norm"]))(p, y)


def normed_before(p, x):
    normed = rms(x, p["one"])
    return layers(lambda p, x, layer: (x * layer["norm"]) + normed @ layer["w"])(p, x)


SCANS = {
    "one norm for all layers": (layers(lambda p, x, layer: rms(x, p["one"]) @ layer["w"]), "shared by the layers"),
    "one weight for all layers": (layers(lambda p, x, layer: rms(x, layer["norm"]) @ p["v"]), "shared by the layers"),
    "normed before the layers": (normed_before, "shared by the layers"),
    "a layer read outside": (read_before, "sliced layer by layer"),
    "layers used twice": (scanned_twice, "two scans"),
    "norms used twice": (normed_twice, "two scans"),
}


@pytest.mark.parametrize("name", SCANS)
def test_layers_do_not_share_scales_with_what_is_outside(name):
    fn, reason = SCANS[name]
    traced = sites(fn, STACKS, X)
    assert not traced.folds
    assert any(reason in site.refused for site in traced.sites.values())


def test_what_all_layers_share_can_be_folded():
    model = Model(layers(lambda p, x, layer: rms(x, p["one"]) @ p["v"] * layer["norm"]), STACKS, (X,))
    traced = sites(model.fn, STACKS, X)
    (fold,) = traced.folds
    assert {(m.param, m.inverse) for m in fold.members} == {("one", True), ("v", False)}
    factors = random_factors(fold, traced, STACKS, np.random.default_rng(0))
    assert change(model.fn, model, gauged(STACKS, [(m, factors) for m in fold.members])) < 1e-5


def test_heads_with_a_bias_are_folded_in_a_stack_too():
    @loose
    def fn(p, x):
        def step(x, p):
            heads = jnp.einsum("ti,ind->tnd", x, p["v"]) + p["bias"]
            return x + jnp.einsum("tnd,ndi->ti", heads, p["o"]), None

        return lax.scan(step, x, p)[0]

    params = {"v": normal(2, 8, 3, 4), "bias": normal(2, 3, 4, seed=1), "o": normal(2, 3, 4, 8, seed=2)}
    model, traced = Model(fn, params, (X,)), sites(fn, params, X)
    (fold,) = traced.folds
    assert {m.param: m.axes for m in fold.members} == {"v": (2, 3), "bias": (1, 2), "o": (1, 2)}
    factors = random_factors(fold, traced, params, np.random.default_rng(0))
    assert change(fn, model, gauged(params, [(m, factors) for m in fold.members])) < 1e-5


def test_an_embedding_has_no_unknown_for_each_entry():
    shapes = {"embed": (1000, 64), "positions": (16, 64), "w": (64, 64)}
    fn = lambda embed, positions, w, x: (embed[x] + positions[None]) @ w
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes.values()]
    jaxpr = jax.make_jaxpr(fn)(*arrays, jax.ShapeDtypeStruct((2, 16), jnp.int32))
    found = components(jaxpr, dict(enumerate(shapes.items())))
    assert len(found.component) <= 1 + sum(map(sum, shapes.values()))


SHAPES = [
    ((4, 6), (24,)),
    ((24,), (2, 3, 4)),
    ((4, 6), (2, 2, 6)),
    ((4, 6), (3, 8)),
    ((1, 4, 6), (4, 1, 6)),
    ((2, 3, 4), (6, 4)),
]


@given(shapes=st.sampled_from([pair[::d] for pair in SHAPES for d in (1, -1)]), data=st.data())
def test_ids_follow_a_reshape(shapes, data):
    old, new = shapes
    short_shape = [n if data.draw(st.booleans()) else 1 for n in old]
    ids = np.arange(math.prod(short_shape)).reshape(short_shape)
    moved = reshape_ids(ids, old, new)
    np.testing.assert_array_equal(np.broadcast_to(moved, new), np.broadcast_to(ids, old).reshape(new))

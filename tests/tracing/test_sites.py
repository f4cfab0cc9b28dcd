"""What tracing says of a function's matmuls: names, sizes, which share an input, which are none."""

import tracemalloc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from loose import loose
from zoo import WAYS, ZOO, short

from awq_jax.tracing.sites import sites
from awq_jax.weights.paths import named_leaves
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import round_to_nearest

LLAMA = ["q k v", "o", "gate up", "down"]
GROUPS = {
    "llama": [*LLAMA, "head"],
    "llama_jitted": [*LLAMA, "head"],
    "llama_scanned": [*LLAMA, "head"],
    "llama_tied": [*LLAMA, "embed"],
    "gemma": [*LLAMA, "embed"],
    "gpt2": ["qkv", "proj", "fc_in", "fc_out", "embed"],
    "opt": ["q k v", "o", "fc1", "fc2", "head"],
    "gptj": ["q k v fc_in", "fc_out", "o", "head"],
    "moe": ["q k v", "o", "gate up", "router", "down", "head"],
    "moe_scanned": ["q k v", "o", "gate up", "router", "down", "head"],
    "shared_expert": [
        "q k v", "o", "shared_gate shared/gate shared/up router", "shared/down", "gate up", "down", "head",
    ],
    "einsum_attention": [*LLAMA, "head"],
    "custom_activation": ["up", "down", "head"],
    "rearranged": ["q k v", "o", "head"],
}  # fmt: skip


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def traced(name):
    model = ZOO[name]()
    return sites(model.fn, model.params, *model.inputs)


def groups_of(found):
    """The names of sites that share an input, in the order of the first of each."""
    out = {}
    for site in found.sites.values():
        out.setdefault(site.group, []).append(site.name)
    assert all(members[0] == group for group, members in out.items())
    return list(out.values())


@pytest.mark.parametrize("name", ZOO)
def test_sites_that_read_the_same_tensor_are_a_group(name):
    groups = groups_of(traced(name))
    first = [" ".join(map(short, names)) for names in groups if not names[0].startswith("layers/1/")]
    assert sorted(first) == sorted(GROUPS[name])


def test_layers_have_the_same_groups():
    groups = [" ".join(names) for names in groups_of(traced("llama"))]
    first, second = ([names for names in groups if names.startswith(f"layers/{k}/")] for k in range(zoo.LAYERS))
    assert second == [names.replace("layers/0/", "layers/1/") for names in first]


@pytest.mark.parametrize(
    ("name", "sizes"),
    {
        "llama": {"q": (32, 32), "k": (32, 16), "o": (32, 32), "gate": (32, 48), "down": (48, 32), "head": (32, 40)},
        "llama_scanned": {"q": (32, 32), "v": (32, 16), "down": (48, 32), "head": (32, 40)},
        "llama_tied": {"embed": (32, 40)},
        "gpt2": {"qkv": (32, 96), "fc_out": (48, 32)},
        "moe": {"router": (32, 3), "gate": (32, 48), "down": (48, 32)},
        "shared_expert": {"shared_gate": (32, 1)},
        "einsum_attention": {"q": (32, 32), "o": (32, 32)},
        "rearranged": {"q": (32, 32), "v": (32, 32), "o": (32, 32), "head": (32, 40)},
    }.items(),
)
def test_features_are_counted_as_the_matmul_sees_them(name, sizes):
    found = {short(site.name): (site.in_features, site.out_features) for site in traced(name).sites.values()}
    assert {k: found[k] for k in sizes} == sizes


@pytest.mark.parametrize("name", ["moe", "moe_scanned", "llama", "llama_scanned"])
def test_layers_and_experts_are_told_apart(name):
    for site in traced(name).sites.values():
        batched = name.startswith("moe") and site.name.endswith(("gate", "up", "down"))
        assert site.lead == ((zoo.EXPERTS,) if batched else ()), site.name
        assert site.stacked == (name.endswith("scanned") and site.name != "head"), site.name


def test_a_scan_in_a_scan_slices_twice():
    def fn(p, x):
        layer = lambda x, w: (jnp.tanh(x @ w), None)
        return lax.scan(lambda x, ws: lax.scan(layer, x, ws), x, p)[0]

    (site,) = sites(fn, normal(2, 3, 8, 8), normal(5, 8)).sites.values()
    assert (site.stacked, site.in_features, site.out_features) == (2, 8, 8)


@pytest.mark.parametrize("way", WAYS)
def test_the_layout_gives_the_matrix_whichever_way_it_is_written(way):
    fn, shape = WAYS[way]
    x, w = normal(5, 6), normal(*shape, seed=1)
    (site,) = sites(lambda p, x: fn(p["w"], x), {"w": w}, x).sites.values()
    matrix = np.asarray(site.layout.apply(jnp.asarray(w)))
    assert matrix.shape == (6, site.out_features)
    expected = np.asarray(fn(w, x)).reshape(5, -1)
    np.testing.assert_allclose(x @ matrix, expected, rtol=1e-5, atol=1e-5)


def test_experts_are_a_batch_of_matrices():
    x, w = normal(3, 5, 6), normal(6, 3, 4, seed=1)
    (site,) = sites(lambda w, x: jnp.einsum("eti,ieo->eto", x, w), w, x).sites.values()
    assert (site.lead, site.in_features, site.out_features) == ((3,), 6, 4)
    np.testing.assert_array_equal(site.layout.apply(w), w.transpose(1, 0, 2))


NO_SITES = {
    "activations": lambda p, x: jax.nn.softmax(x @ x.T) @ x,
    "a constant": lambda p, x: x @ np.eye(6, dtype=np.float32) * p["w"].sum(),
    "two params": lambda p, x: x + (p["w"] @ p["v"])[0],
    "a product of params": lambda p, x: x @ (p["w"] @ p["v"]),
    "no axis is contracted": lambda p, x: jnp.einsum("t,o->to", x[:, 0], p["w"][0]),
    "an outer product": lambda p, x: lax.dot_general(x, p["w"], (((), ()), ((), ()))),
    "changed before": lambda p, x: x @ (2 * p["w"]),
    "one added": lambda p, x: x @ (1 + p["w"]),
    "nothing added": lambda p, x: x @ (p["w"] + 0.0),
    "negated": lambda p, x: x @ (0.0 - p["w"]),
    "read as it is and turned": lambda p, x: x @ p["w"] @ p["w"].T,
    "read as it is and turned in two branches": lambda p, x: lax.cond(
        x.sum() > 0, lambda: x @ p["w"], lambda: x @ p["w"].T
    ),
    "chosen by a branch": lambda p, x: x @ lax.cond(x.sum() > 0, lambda: p["w"], lambda: p["v"]),
    "a 3 x 3 convolution": lambda p, x: lax.conv(x[None, None], p["w"][None, None], (1, 1), "SAME"),
}


@pytest.mark.parametrize("name", NO_SITES)
def test_these_are_no_sites(name):
    params = {"w": normal(6, 6), "v": normal(6, 6)}
    assert not sites(loose(NO_SITES[name]), params, normal(5, 6)).sites


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda p, x: x + p["w"][0], {"w": "add", "v": "not used"}),
        (lambda p, x: x @ p["w"][:, :2], {"w": "slice", "v": "not used"}),
        (lambda p, x: x @ p["w"] @ p["w"].T, {"w": "read in two ways", "v": "not used"}),
        (lambda p, x: jnp.tanh(p["w"])[x[0, 0].astype(int)] * p["v"], {"w": "tanh", "v": "mul"}),
        (lambda p, x: (x @ p["w"], p["v"]), {"v": "return"}),
        (lambda p, x: x @ (p["w"] * 0.1) @ p["v"], {"w": "mul"}),
    ],
)
def test_a_matrix_that_is_no_site_says_why(fn, why):
    assert sites(loose(fn), {"w": normal(6, 6), "v": normal(6, 6)}, normal(5, 6)).skipped == why


def test_biases_of_several_heads_are_no_matrices():
    fn = lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"]) + p["b"][None]
    assert sites(fn, {"w": normal(6, 2, 3), "b": normal(2, 3)}, normal(5, 6)).skipped == {}


def test_a_stack_of_vectors_is_no_matrix():
    fn = lambda p, x: lax.scan(lambda x, s: (x * s[None], None), x, p)[0]
    assert sites(fn, normal(3, 6), normal(5, 6)).skipped == {}


def test_what_else_uses_a_tied_embedding():
    found = traced("llama_tied")
    assert found.sites["embed"].kept == "also used by gather"
    assert all(site.kept is None for name, site in found.sites.items() if name != "embed")
    assert (
        "embed              32 x 40; cannot fold: gather; stays dense: also used by gather" in str(found).splitlines()
    )


def test_a_param_that_is_used_twice_alike_is_one_site():
    found = sites(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], {"w": normal(6, 6)}, normal(5, 6))
    assert list(found.sites) == ["w"]


def scan_with(*order):
    """Layers of which each reads its own weight and one that all share, in this order."""

    def fn(p, x):
        def step(x, own):
            weights = {"shared": p["shared"], "stacked": own}
            return sum(jnp.tanh(x @ weights[name]) for name in order), None

        return lax.scan(step, x, p["stacked"])[0]

    return fn, {"shared": normal(6, 6), "stacked": normal(3, 6, 6)}, normal(5, 6)


TWO = {"a": normal(6, 4), "b": normal(6, 4)}
INPUTS_THAT_DIFFER = {
    "another tensor": (lambda p, x: (x @ p["a"], jnp.tanh(x) @ p["b"]), TWO, normal(5, 6)),
    "other channels": (lambda p, x: (x @ p["a"], x[:, ::-1] @ p["b"]), TWO, normal(5, 6)),
    "channels in another order": (
        lambda p, x: (x @ p["a"], x.reshape(5, 2, 3).transpose(0, 2, 1).reshape(5, 6) @ p["b"]),
        TWO,
        normal(5, 6),
    ),
    "tokens as channels": (lambda p, x: (x @ p["a"], x.T @ p["b"]), TWO, normal(6, 6)),
    "experts together and apart": (
        lambda p, x: (jnp.einsum("eti,eio->to", x, p["a"]), jnp.einsum("eti,eio->eto", x, p["b"])),
        {"a": normal(2, 6, 4), "b": normal(2, 6, 4)},
        normal(2, 5, 6),
    ),
    "one layer's and all layers'": scan_with("shared", "stacked"),
    "all layers' and one layer's": scan_with("stacked", "shared"),
}


@pytest.mark.parametrize("name", INPUTS_THAT_DIFFER)
def test_sites_of_other_channels_are_no_group(name):
    fn, params, x = INPUTS_THAT_DIFFER[name]
    assert [len(names) for names in groups_of(sites(fn, params, x))] == [1, 1]


SAME_INPUT = {
    "tokens merged": lambda p, x: (x @ p["a"], x.reshape(-1, 6) @ p["b"]),
    "tokens turned": lambda p, x: (x @ p["a"], x.transpose(1, 0, 2) @ p["b"]),
    "another precision": lambda p, x: (x @ p["a"], x.astype(jnp.bfloat16).astype(jnp.float32) @ p["b"]),
    "in a jit": lambda p, x: (x @ p["a"], jax.jit(jnp.dot)(x, p["b"])),
    "in a checkpoint": lambda p, x: (x @ p["a"], jax.checkpoint(jnp.dot)(x, p["b"])),
}


@pytest.mark.parametrize("name", SAME_INPUT)
def test_rearranged_tokens_are_the_same_input(name):
    found = sites(SAME_INPUT[name], TWO, normal(2, 5, 6))
    assert groups_of(found) == [["a", "b"]]


def test_every_site_that_no_fold_covers_says_why():
    for name in ZOO:
        found = traced(name)
        folded = {site for fold in found.folds for site in fold.sites}
        assert {site.name for site in found.sites.values() if site.refused is None} == folded
        assert all(site.refused for site in found.sites.values() if site.name not in folded)


@pytest.mark.parametrize(
    ("name", "site", "reason"),
    [("gpt2", "layers/0/fc_out/w", "integer_pow"), ("llama_tied", "embed", "gather"), ("gemma", "embed", "gather")],
)
def test_the_reason_names_what_is_in_the_way(name, site, reason):
    assert traced(name).sites[site].refused == reason


def test_shapes_are_enough():
    model = ZOO["llama"]()
    shapes = jax.eval_shape(lambda *a: a, model.params, *model.inputs)
    assert sites(model.fn, *shapes).sites == traced("llama").sites


def test_the_memory_of_tracing_grows_with_the_width_not_its_square():
    def peak(width):
        shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
        params = {"norm": shape(4, width), "up": shape(4, width, 4 * width), "down": shape(4, 4 * width, width)}
        block = lambda x, p: (x + jax.nn.relu(zoo.rms(x, p["norm"]) @ p["up"]) @ p["down"], None)
        tracemalloc.start()
        found = sites(lambda p, x: lax.scan(block, x, p)[0], params, shape(8, width))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(found.folds) == 2
        return most

    peak(1024)
    assert peak(16384) < 5 * peak(4096)


class Params(NamedTuple):
    layers: list
    eps: float


def test_leaves_are_named_by_their_path():
    dense, quantized = normal(32, 4), round_to_nearest(normal(32, 4), QuantSpec(group_size=32))
    leaves = named_leaves(Params([{"w": dense}, {"w": quantized}], 1e-5))
    assert list(leaves) == ["layers/0/w", "layers/1/w", "eps"]
    assert leaves["layers/1/w"] is quantized


class Boxed(NamedTuple):
    value: Any


class Attention(NamedTuple):
    query: Any
    value: Any


def test_a_box_has_no_name_but_a_param_called_value_has():
    w = normal(6, 4)
    assert list(named_leaves({"w": Boxed(w)})) == ["w"]
    assert list(named_leaves(Attention(Boxed(w), w))) == ["query", "value"]
    assert list(named_leaves(Attention({"kernel": w}, w))) == ["query/kernel", "value"]


def test_two_params_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two params are both called 'a/b'"):
        named_leaves({"a": {"b": 1.0}, "a/b": 2.0})


@pytest.mark.parametrize("dtype", ["int8", "complex64"])
def test_what_is_no_floating_point_number_is_no_site(dtype):
    params = {"w": normal(6, 4), "other": np.ones((6, 4), dtype)}
    found = sites(loose(lambda p, x: x @ p["w"] + jnp.abs(x @ p["other"])), params, normal(5, 6))
    assert list(found.sites) == ["w"]
    assert found.skipped == {"other": f"{dtype} weights"}


LOOKING = {
    "if": lambda p, x: x @ p if x.sum() > 0 else x,
    "numpy": lambda p, x: x @ p + np.asarray(x).sum(),
    "index": lambda p, x: x @ p + [1.0, 2.0][(x.sum() > 0).astype(int)],
}


@pytest.mark.parametrize("name", LOOKING)
def test_a_function_that_looks_at_values_is_refused(name):
    with pytest.raises(ValueError, match=r"(?s)looks at values of its params or inputs.*jax.lax.cond"):
        sites(LOOKING[name], normal(6, 4), normal(5, 6))


def test_params_may_hold_plain_numbers():
    found = sites(lambda p, x: x @ p.layers[0] + p.eps, Params([normal(6, 4)], 1e-5), normal(5, 6))
    assert list(found.sites) == ["layers/0"]


def lora(p, x, factor=2.0):
    return x @ p["w"] + (x @ p["a"]) @ p["b"] * factor


LORA = {"w": normal(16, 12), "a": normal(16, 4), "b": normal(4, 12)}


def test_an_adapter_is_told_from_what_it_adapts():
    kept = {site.name: site.kept for site in sites(lora, LORA, normal(5, 16)).sites.values()}
    assert kept == {"w": None, "a": "an adapter of w", "b": "an adapter of w"}


NO_ADAPTERS = {
    "nothing beside them": (lambda p, x: (x @ p["a"]) @ p["b"], LORA),
    "something between them": (lambda p, x: x @ p["w"] + jnp.tanh(x @ p["a"]) @ p["b"], LORA),
    "not of low rank": (lora, {"w": normal(16, 12), "a": normal(16, 7), "b": normal(7, 12)}),
    "beside another input": (lambda p, x: jnp.tanh(x) @ p["w"] + (x @ p["a"]) @ p["b"], LORA),
}


@pytest.mark.parametrize("name", NO_ADAPTERS)
def test_these_are_no_adapters(name):
    fn, params = NO_ADAPTERS[name]
    assert not any(site.kept for site in sites(fn, params, normal(5, 16)).sites.values())


KEY = jax.random.key(0)
CONSTANTS = {
    "a random key": lambda x: x + jax.random.normal(KEY, (4,)),
    "a complex number": lambda x: (x * jnp.complex64(1j)).imag,
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_may_be(name):
    assert list(sites(lambda w, x: loose(CONSTANTS[name])(x @ w), normal(6, 4), normal(5, 6)).sites) == [""]


ROUTERS = {
    "ranked at once": lambda y: lax.top_k(y, 2)[1],
    "ranked after softmax": lambda y: lax.top_k(jax.nn.softmax(y), 2)[1],
    "ranked after a sigmoid and a bias": lambda y: jnp.argsort(jax.nn.sigmoid(y) + jnp.arange(3.0))[..., :2],
    "the likeliest": lambda y: jax.nn.softmax(y / 3).argmax(-1),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_is_told_by_what_is_done_with_its_outputs(name):
    def fn(p, x):
        x = jnp.tanh(x @ p["w"])
        return loose(ROUTERS[name])(x @ p["router"]), x @ p["v"]

    params = {"w": normal(6, 6), "router": normal(6, 3), "v": normal(6, 4)}
    kept = {site.name: site.kept for site in sites(fn, params, normal(5, 6)).sites.values()}
    assert kept == {"w": None, "router": "its outputs are ranked (a router, or a head before argmax)", "v": None}


def test_explicitly_sharded_params_are_refused():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Explicit,))
    w = jax.device_put(normal(8, 8), NamedSharding(mesh, P("model")))
    with pytest.raises(ValueError, match="w is cut along a mesh axis of type Explicit"):
        sites(lambda p, x: x @ p["w"], {"w": w}, normal(5, 8))

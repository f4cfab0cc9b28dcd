"""Segments: where a function is cut, what its pieces share, and that together they are the function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import BLOCKS, FAR, MATRICES, STACK, X, mixed
from jax import lax
from loose import loose
from quick import quick_compilation
from zoo import MLP, TOKENS, WIDTH, ZOO, Draw

from awq_jax.tracing.flat import Constant, Value
from awq_jax.tracing.live import Live
from awq_jax.tracing.program import slot
from awq_jax.tracing.segments import minima, segments
from awq_jax.tracing.sites import sites
from awq_jax.weights.paths import named_leaves

DRAW = Draw()
MODELS = ZOO | BLOCKS
COUNTS = {
    "llama": (6, 4),
    "llama_scanned": (6, 4),
    "gemma": (4, 4),
    "gpt2": (4, 4),
    "moe_scanned": (6, 4),
    "own_llama": (10, 4),
    "linen_scanned": (5, 3),
    "nnx_blocks": (3, 2),
    "equinox_blocks": (3, 2),
    "unet": (11, 11),
    "encoder_decoder": (12, 6),
}
"""How many segments of how many programs."""


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compilation():
        yield


def by_name(found, kind):
    """The names that a segment's sites and folds have in the params."""
    return {str(s.params[int(name[1:-1])]): x for s in found.segments for name, x in kind(s)}


def run(found, params, *inputs):
    """The outputs of a function, segment by segment; and what its segments read."""
    leaves, live = named_leaves(params), Live(0)
    live.put(found.inputs, jax.tree.leaves(inputs))
    for s in found.segments:
        stored = {slot(k): jnp.asarray(p.of(leaves[p.name])) for k, p in enumerate(s.params)}
        live.put(s.writes, jax.jit(s.program.fn)(stored, *live.get(s.reads)))
    known = lambda v: v.value if isinstance(v, Constant) else live.arrays[v]
    return [known(v) for v in found.outputs]


@pytest.mark.parametrize("name", COUNTS)
def test_equal_blocks_are_segments_of_one_program(name):
    model = MODELS[name]()
    found = segments(model.fn, model.params, *model.inputs)
    assert (len(found.segments), len(found.programs)) == COUNTS[name]
    assert str(found).count("program ") == COUNTS[name][0]


@pytest.mark.parametrize("name", MODELS)
def test_segments_have_the_functions_sites_and_folds(name):
    model = MODELS[name]()
    found = segments(model.fn, model.params, *model.inputs)
    whole = sites(model.fn, model.params, *model.inputs)
    cut = by_name(found, lambda s: s.traced.sites.items())
    assert {n.split("[")[0] for n in cut} == {*whole.sites}
    for n, site in cut.items():
        expected = whole.sites[n.split("[")[0]]
        assert (site.layout, site.lead, bool(site.kept)) == (expected.layout, expected.lead, bool(expected.kept))
        assert bool(site.refused) == (bool(expected.refused) or n in FAR.get(name, ()))
    of_segments = {
        frozenset(str(s.params[int(n[1:-1])]).split("[")[0] for n in f.sites)
        for s in found.segments
        for f in s.traced.folds
    }
    assert of_segments == {frozenset(f.sites) for f in whole.folds} - {frozenset(FAR.get(name, ()))}


@pytest.mark.parametrize("name", BLOCKS)
def test_segments_one_after_the_other_are_the_function(name):
    model = MODELS[name]()
    found = run(segments(model.fn, model.params, *model.inputs), model.params, *model.inputs)
    expected = jax.tree.leaves(jax.jit(model.fn)(model.params, *model.inputs))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_no_segment_reads_more_than_its_block():
    model = BLOCKS["own_llama"]()
    found = segments(model.fn, model.params, *model.inputs)
    layer = sum(w.nbytes for w in jax.tree.leaves(model.params["layers_0"]))
    assert max(s.nbytes for s in found.segments) < layer
    assert {n for s in found.segments for n in map(str, s.params)} == {*named_leaves(model.params)}


def only(fn, params, *inputs):
    found = segments(fn, params, *inputs)
    for a, b in zip(run(found, params, *inputs), jax.tree.leaves(jax.jit(fn)(params, *inputs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    return found


def test_a_function_of_one_block_is_one_segment():
    (one,) = only(lambda w, x: x @ w, MATRICES[0], X).segments
    assert list(one.traced.sites) == [slot(0)]


def test_a_function_without_params_or_inputs_is_one_segment():
    for found in (only(lambda _, x: jnp.tanh(x), {}, X), segments(lambda w: 2 * w, MATRICES[0])):
        assert [len(s.traced.sites) for s in found.segments] == [0]


def test_params_that_nothing_reads_are_told():
    found = only(lambda p, x: x @ p["w"], {"w": MATRICES[0], "other": MATRICES[1]}, X)
    assert found.unread == ("other",)


LAYERED = {
    "a list": (lambda ws, x: [x := mixed(w, x) for w in ws][-1], MATRICES),
    "picked from a stack": (lambda w, x: [x := mixed(w[k], x) for k in range(4)][-1], STACK),
    "a scan": (lambda w, x: lax.scan(lambda x, w: (mixed(w, x), x.mean()), x, w), STACK),
    "a scan that goes back": (lambda w, x: lax.scan(lambda x, w: (mixed(w, x), x.mean()), x, w, reverse=True), STACK),
    "a scan in a jit": (jax.jit(lambda w, x: lax.scan(lambda x, w: (mixed(w, x), None), x, w)[0]), STACK),
    "a scan of remat": (
        lambda w, x: lax.scan(jax.checkpoint(lambda x, w: (mixed(w, x), None)), x, w)[0],
        STACK,
    ),
    "a turned stack": (
        lambda w, x: lax.scan(lambda x, w: (mixed(w, x), None), x, w.transpose(1, 0, 2))[0],
        STACK.transpose(1, 0, 2),
    ),
    "a cast stack": (
        lambda w, x: lax.scan(lambda x, w: (mixed(w, x), None), x, w.astype(jnp.float32))[0],
        STACK.astype(jnp.bfloat16),
    ),
    "a scan in a scan": (
        lambda w, x: lax.scan(lambda x, w: (lax.scan(lambda x, w: (mixed(w, x), None), x, w)[0], None), x, w)[0],
        STACK.reshape(2, 2, WIDTH, WIDTH),
    ),
    "a scan over numbers too": (
        lambda w, x: lax.scan(
            lambda x, wk: (jnp.where(wk[1] % 2 == 0, mixed(wk[0], x), x), None), x, (w, jnp.arange(4))
        )[0],
        STACK,
    ),
}


@pytest.mark.parametrize("way", LAYERED)
def test_layers_are_one_program_each_with_its_own_slice(way):
    fn, params = LAYERED[way]
    found = only(loose(fn), params, X)
    assert len(found.segments) == 4
    assert len(found.programs) < 4  # what a scan gives beside is put together in the last
    sizes = {s.nbytes for s in found.segments}
    assert sizes == {WIDTH * WIDTH * params[0].dtype.itemsize}
    names = [str(p) for s in found.segments for p in s.params]
    assert len(set(names)) == 4


def test_a_stack_that_is_read_as_a_whole_too_is_read_as_a_whole():
    fn = lambda w, x: lax.scan(lambda x, w: (mixed(w, x), None), x, w)[0] + jnp.square(w).mean()
    found = only(loose(fn), STACK, X)
    assert {str(p) for s in found.segments for p in s.params} == {""}


def test_a_vector_that_a_scan_slices_does_not_unroll_it():
    fn = lambda p, x: lax.scan(lambda x, b: (mixed(p["w"], x) + b, None), x, p["b"])[0]
    (one,) = only(loose(fn), {"w": MATRICES[0], "b": DRAW.vector(50, WIDTH)}, X).segments
    assert len(one.params) == 2


CONTROL = {
    "while": lambda w, x: lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, mixed(w, s[1])), (0, x))[1],
    "cond": lambda w, x: lax.cond(x.sum() > 0, lambda x: mixed(w, x), lambda x: x, x),
    "a scan over tokens": lambda w, x: lax.scan(lambda h, x: (jnp.tanh(h @ w + x), h), jnp.zeros(WIDTH), x)[1],
}


@pytest.mark.parametrize("name", CONTROL)
def test_control_flow_with_params_in_it_is_in_one_segment(name):
    fn = lambda p, x: mixed(p[2], CONTROL[name](p[1], mixed(p[0], x)))
    found = only(loose(fn), MATRICES[:3], X)
    assert [[str(p) for p in s.params] for s in found.segments] == [["0"], ["1"], ["2"]]


def test_params_of_two_segments_are_kept_and_belong_to_one():
    model = ZOO["llama_tied"]()
    found = segments(model.fn, model.params, *model.inputs)
    owners = [s for s in found.segments if any(str(p) == "embed" for p in s.owned)]
    assert owners == [found.segments[-1]]
    site = owners[0].traced.sites[slot([str(p) for p in owners[0].params].index("embed"))]
    assert site.kept == "also used by gather"
    assert site.refused == "a param of its fold is also used by gather"


def test_layers_that_share_their_matrices_are_one_segment():
    def fn(p, x):
        for _ in range(3):
            x = x + jax.nn.gelu(x @ p["up"]) @ p["down"]
        return x @ p["out"]

    params = {"up": DRAW.matrix(WIDTH, MLP), "down": DRAW.matrix(MLP, WIDTH), "out": MATRICES[0]}
    found = only(loose(fn), params, X)
    assert [sorted(map(str, s.params)) for s in found.segments] == [["down", "up"], ["out"]]


def test_a_matrix_at_both_ends_stays_dense_where_memory_does_not_allow_one_segment():
    def fn(p, x):
        for w in (p["ends"], *p["layers"], p["ends"]):
            x = mixed(w, x)
        return x

    found = only(loose(fn), {"ends": MATRICES[0], "layers": MATRICES[1:]}, X)
    assert len(found.segments) == 5
    assert [s.traced.sites[slot(0)].kept for s in found.segments] == [
        "also used by a matmul of another segment",
        *[None] * 3,
        "also used by a matmul of another segment",
    ]
    assert [bool(s.owned) for s in found.segments] == [False, True, True, True, True]


@pytest.mark.parametrize("layers", [2, 4])
def test_a_vector_of_many_segments_takes_no_fold_where_memory_does_not_allow_one_segment(layers):
    norm = lambda x, s: x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * s

    def fn(p, x):
        for w in p["ws"]:
            x = x + jax.nn.gelu(norm(x, p["norm"]) @ w)
        return x

    params = {"norm": DRAW.vector(WIDTH, around=1), "ws": MATRICES[:layers]}
    found = only(loose(fn), params, X)
    assert sum(len(s.traced.folds) for s in found.segments) == (1 if layers == 2 else 0)
    refused = {site.refused for s in found.segments for site in s.traced.sites.values()}
    assert refused == {None if layers == 2 else "a param of its fold is also used by another segment"}


def test_several_inputs_and_outputs_integers_and_keys():
    def fn(p, tokens, extra, key):
        x = p["embed"][tokens] + extra["bias"]
        noise = jax.random.split(key)
        for k, w in enumerate(p["ws"]):
            x = mixed(w, x) + 0.1 * jax.random.normal(noise[k], x.shape)
        return {"x": x, "tokens": tokens, "best": x.argmax(-1), "w": p["ws"][0], "one": 1.0}

    params = {"embed": DRAW.matrix(40, WIDTH), "ws": MATRICES[:2]}
    inputs = (TOKENS, {"bias": X[0]}, jax.random.key(0))
    found = segments(loose(fn), params, *inputs)
    assert len(found.segments) == 3
    expected = jax.jit(loose(fn))(params, *inputs)
    live = Live(0)
    live.put(found.inputs, jax.tree.leaves(inputs))
    for s in found.segments:
        stored = {slot(k): jnp.asarray(named_leaves(params)[p.name]) for k, p in enumerate(s.params)}
        live.put(s.writes, s.program.fn(stored, *live.get(s.reads)))
    best, one, tokens, w, x = found.outputs
    assert isinstance(one, Constant)
    assert isinstance(w, Value)
    assert w.is_read
    known = lambda v: live.arrays[v]
    np.testing.assert_array_equal(known(tokens), TOKENS)
    np.testing.assert_array_equal(known(best), expected["best"])
    np.testing.assert_allclose(known(x), expected["x"], rtol=1e-5, atol=1e-5)


def test_other_constants_are_other_programs():
    masks = [np.arange(WIDTH) % 2 == k for k in (0, 1, 0, 0)]

    def fn(ws, x):
        for w, mask in zip(ws, masks, strict=True):
            x = jnp.where(mask, mixed(w, x), x)
        return x

    found = only(loose(fn), MATRICES, X)
    assert [found.programs.index(s.program) for s in found.segments] == [0, 1, 0, 2]


def test_other_shapes_of_inputs_are_cut_at_the_same_places():
    model = BLOCKS["own_llama"]()
    first = segments(model.fn, model.params, *model.inputs)
    other = segments(model.fn, model.params, TOKENS[:1, :3], like=first)
    assert [s.params for s in other.segments] == [s.params for s in first.segments]
    assert other.reading == first.reading


def test_a_function_that_does_other_things_with_other_shapes_is_refused():
    fn = lambda ws, x: mixed(ws[1], mixed(ws[0], x)) if len(x) > 3 else mixed(ws[0], mixed(ws[1], x))
    first = segments(loose(fn), MATRICES[:2], X)
    with pytest.raises(ValueError, match="other things with inputs of other shapes: give batches of one shape"):
        segments(loose(fn), MATRICES[:2], X[:2], like=first)


def test_long_chains_of_what_depends_on_params_alone():
    def fn(p, x):
        w = p["w"]
        for _ in range(600):
            w = w * 0.999 + p["b"]
        return mixed(p["last"], mixed(w, x))

    params = {"w": MATRICES[0], "b": np.zeros((WIDTH, WIDTH), np.float32), "last": MATRICES[1]}
    found = segments(loose(fn), params, X)
    assert [sorted(map(str, s.params)) for s in found.segments] == [["b", "w"], ["last"]]


def test_minima_are_floors():
    assert minima([300, 100, 200, 100, 105, 300, 50]) == [1, 3, 4, 6]
    assert minima([1]) == [0]
    assert minima([]) == []

"""Streaming any function: what calibration and quantization of the whole function give, with a part of it in memory."""

import functools as ft
import importlib
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import BLOCKS, FAR, MATRICES, STACK, X, mixed, own_llama
from compilations import compilations
from jax import lax
from loose import loose
from quick import quick_compilation
from zoo import TOKENS, WIDTH, ZOO, Model

import awq_jax as awq
from awq_jax import memory
from awq_jax.search import Grid, no_clip, to_nearest
from awq_jax.tracing.flat import Value
from awq_jax.tracing.live import Live
from awq_jax.tracing.program import slot
from awq_jax.tracing.segments import segments
from awq_jax.transforms.stream import Lazy, stream
from awq_jax.weights.paths import named_leaves
from awq_jax.weights.tensor import is_quantized

QUICK = awq.Recipe(group_size=32, scale=Grid((0.0, 0.5, 1.0)), clip=no_clip, rounding=to_nearest)


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compilation():
        yield


def batches_of(model: Model, n: int = 2):
    return [tuple(np.roll(x, k, 0) if k else x for x in model.inputs) for k in range(n)]


class Run:
    """A model streamed, and quantized in memory, with one recipe."""

    def __init__(self, model: Model, recipe: awq.Recipe):
        self.params, self.calibrations, self.found = model.params, [], {}
        batches = batches_of(model)
        self.streamed = stream(model.fn, model.params, batches, recipe, solve=self.solve)
        for s, calibration in zip(
            segments(model.fn, model.params, *batches[0]).segments, self.calibrations, strict=True
        ):
            names = {slot(k): p for k, p in enumerate(s.params)}
            self.found |= {names[site]: calibration.of(site) for site in calibration.traced.sites}
        self.whole = awq.calibrate(model.fn, model.params, batches, block=recipe.gram_block)
        self.quantized, self.reports = awq.quantize(model.params, self.whole, recipe)

    def solve(self, params, calibration, recipe):
        self.calibrations.append(calibration)
        return awq.quantize(params, calibration, recipe)


RUNS = {
    "own_llama": ft.partial(own_llama, 2),
    "linen_scanned": BLOCKS["linen_scanned"],
    "moe": ZOO["moe"],
    "nnx_blocks": BLOCKS["nnx_blocks"],
    "equinox_blocks": BLOCKS["equinox_blocks"],
    "unet": BLOCKS["unet"],
    "encoder_decoder": BLOCKS["encoder_decoder"],
}


@pytest.fixture(scope="module", params=RUNS)
def run(request):
    # A fold from the encoder's norm to every layer of the decoder is for those who have it all in memory.
    return Run(RUNS[request.param](), replace(QUICK, scales="beside" if request.param == "encoder_decoder" else "both"))


def test_moments_are_those_of_the_whole_function(run):
    assert {p.name for p in run.found} == {*run.whole.traced.sites}
    for param, moments in run.found.items():
        expected = jax.tree.map(lambda a, p=param: a[p.picks] if p.picks else a, run.whole.of(param.name))
        for a, b in zip(jax.tree.leaves(moments), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)


def test_quantized_params_are_those_of_the_whole_function(run):
    assert jax.tree.structure(run.streamed.params) == jax.tree.structure(run.quantized)
    for (name, a), b in zip(
        named_leaves(run.streamed.params).items(), named_leaves(run.quantized).values(), strict=True
    ):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(x, y, name)


def test_reports_are_those_of_the_whole_function(run):
    """But for why a site takes no fold, of which a segment may know another reason."""
    told = lambda r: replace(r, note=re.sub("not folded: .*", "not folded", r.note))
    whole = {r.name: told(r) for r in run.reports}
    assert {r.name.split("[")[0] for r in run.streamed.reports} == {*whole}
    for r in run.streamed.reports:
        if "[" not in r.name:
            assert told(r) == whole[r.name]


def test_memory_holds_a_part_of_the_params(run):
    total = sum(w.nbytes for w in jax.tree.leaves(run.params))
    assert 0 < run.streamed.held["params"] < 0.75 * total
    assert set(run.streamed.seconds) == {"trace", "load", "statistics", "search", "write"}


def layers(fn=mixed):
    return loose(lambda ws, x: ft.reduce(lambda x, w: fn(w, x), ws, x))


BATCHES = [(X,), (2 * X,)]
IN_MEMORY = Model(layers(), MATRICES, (X,))


@pytest.fixture(scope="module")
def in_memory():
    return stream(IN_MEMORY.fn, MATRICES, BATCHES, QUICK)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_what_is_finished_is_handed_over_and_nothing_kept():
    written = {}
    done = stream(IN_MEMORY.fn, MATRICES, BATCHES, QUICK, lambda name, w: written.setdefault(name, w))
    assert list(written) == ["0", "1", "2", "3"]
    assert all(map(is_quantized, written.values()))
    assert done.params is None


def test_a_param_is_read_in_its_turn_and_before_the_one_before_is_written(in_memory):
    happened = []

    def lazy(k):
        return Lazy(
            MATRICES[k].shape, MATRICES[k].dtype, lambda index: happened.append(f"read {k}") or MATRICES[k][index]
        )

    written = {}
    stream(
        IN_MEMORY.fn,
        [lazy(k) for k in range(4)],
        BATCHES,
        QUICK,
        lambda n, w: happened.append(f"write {n}") or written.update({n: w}),
    )
    assert happened == [f"{what} {k}" for k in range(4) for what in ("read", "write")]
    equal([*written.values()], in_memory.params)


def test_of_a_stack_only_one_layer_is_read_at_a_time(in_memory):
    parts = []
    stack = Lazy(STACK.shape, STACK.dtype, lambda index: parts.append(STACK[index]) or parts[-1])
    fn = loose(lambda w, x: lax.scan(lambda x, w: (mixed(w, x), None), x, w)[0])
    done = stream(fn, stack, BATCHES, QUICK)
    assert [part.shape for part in parts] == [(WIDTH, WIDTH)] * 4
    assert [r.name for r in done.reports] == ["[0]", "[1]", "[2]", "[3]"]
    equal(jax.tree.map(lambda *a: jnp.stack(a), *in_memory.params), done.params)


def test_safetensors_and_mapped_files_are_sources(in_memory, tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    save_file({"stack": STACK}, tmp_path / "s.safetensors")
    np.save(tmp_path / "stack.npy", STACK)
    fn = loose(lambda w, x: lax.scan(lambda x, w: (mixed(w, x), None), x, w)[0])
    with safe_open(tmp_path / "s.safetensors", "np") as file:
        part = file.get_slice("stack")
        of_file = stream(fn, Lazy(STACK.shape, STACK.dtype, part.__getitem__), BATCHES, QUICK)
    of_map = stream(fn, np.load(tmp_path / "stack.npy", mmap_mode="r"), BATCHES, QUICK)
    equal(of_file.params, of_map.params)
    equal(of_file.params.codes[2], in_memory.params[2].codes)


def test_after_quantized_segments_the_next_sees_something_else(in_memory):
    done = stream(IN_MEMORY.fn, MATRICES, BATCHES, QUICK, feed="quantized")
    equal(done.params[0], in_memory.params[0])
    assert done.reports[0] == in_memory.reports[0]
    assert done.reports[1].nearest_error != in_memory.reports[1].nearest_error


def test_a_segment_may_see_what_the_quantized_ones_give():
    """Its moments are those of what the quantized segments before it, run one by one, make of the batches."""
    seen = []

    def solve(params, calibration, recipe):
        seen.append(calibration.of(slot(0)))
        return awq.quantize(params, calibration, recipe)

    done = stream(IN_MEMORY.fn, MATRICES, BATCHES, QUICK, feed="quantized", solve=solve)
    x = [jax.jit(awq.quantized(layers()))(done.params[:2], x) for (x,) in BATCHES]
    np.testing.assert_allclose(seen[2].abs_sum, sum(np.abs(x).sum(0) for x in x), rtol=1e-5)


def test_more_layers_compile_no_more():
    found = []
    for n in (3, 6):
        jax.clear_caches()
        with compilations() as compiled:
            stream(layers(), [MATRICES[k % 4] for k in range(n)], BATCHES, QUICK)
        found.append({name: compiled[name] for name in ("step", "solve_sites")})
    assert found == [{"step": 2, "solve_sites": 1}] * 2  # the last layer passes nothing on


def test_beyond_the_budget_live_values_are_in_files_and_the_same(in_memory):
    done = stream(IN_MEMORY.fn, MATRICES, BATCHES, QUICK, budget=0)
    equal(done.params, in_memory.params)
    assert done.held["live"] == in_memory.held["live"] == 2 * 2 * X.nbytes


def test_live_values_are_kept_whatever_their_type():
    key, small, many = jax.random.key(0), jnp.ones((2, 3), jnp.bfloat16), np.arange(12)
    live = Live(50)
    names = [Value(a.shape, a.dtype) for a in (key, small, many)]
    live.put(names, [key, small, many])
    assert [isinstance(a, np.memmap) for a in live.arrays.values()] == [False, False, True]
    equal(live.get(names)[1:], [np.asarray(small), many])
    assert jax.random.key_data(live.get(names)[0]).tolist() == jax.random.key_data(key).tolist()
    live.keep(names[:1])
    assert list(live.arrays) == names[:1]


def test_batches_of_two_shapes(in_memory):
    done = stream(IN_MEMORY.fn, MATRICES, [(X,), (X[:3],), (X[3:],), (X,)], QUICK)
    again = stream(IN_MEMORY.fn, MATRICES, [(X,)] * 3, QUICK)
    for a, b in zip(done.reports, again.reports, strict=True):
        assert a.error == pytest.approx(b.error, rel=1e-3)


def test_rules_see_the_names_of_params_and_of_layers():
    fn = loose(lambda p, x: lax.scan(lambda x, w: (mixed(w, x), None), x, p["layers"])[0])
    rules = (awq.Rule("^layers$", bits=8), awq.Rule(r"\[2\]$", skip=True))
    done = stream(fn, {"layers": STACK}, BATCHES, replace(QUICK, rules=rules), (written := {}).__setitem__)
    assert {r.name: r.spec.bits for r in done.reports if r.spec} == {f"layers[{k}]": 8 for k in (0, 1, 3)}
    assert not is_quantized(written["layers[2]"])


def test_folds_are_tried_once_a_program(monkeypatch):
    tried = []
    module = importlib.import_module("awq_jax.transforms.quantize")
    monkeypatch.setattr(module, "check_folds", lambda fn, params, folds, *inputs: tried.append(len(folds)))
    model = own_llama(3)
    stream(model.fn, model.params, [model.inputs], replace(QUICK, scales="both"))
    assert tried == [2, 2, 1]  # attention, MLP, head
    tried.clear()
    skipped = (awq.Rule("layers_0/mlp/(gate|up)", skip=True),)
    stream(model.fn, model.params, [model.inputs], replace(QUICK, scales="both", rules=skipped))
    assert tried == [2, 1, 2, 1]  # attention, the MLP with down alone, the MLP, head


def test_the_largest_activation_is_told():
    loud = lambda ws, x: layers()(ws, x) * 1000
    dense = lambda params, calibration, recipe: (params, ())
    passed = np.abs(layers()(MATRICES[:1], X)).max()
    one, both = (stream(fn, MATRICES[:2], [(X,)], QUICK, solve=dense).largest for fn in (layers(), loose(loud)))
    assert one >= passed
    assert both == pytest.approx(1000 * np.abs(layers()(MATRICES[:2], X)).max(), rel=1e-5)


def test_batches_that_memory_does_not_hold_are_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"Calibration on 2 batches takes about .* GB are free: give shorter ones"):
        stream(IN_MEMORY.fn, [Lazy(w.shape, w.dtype, pytest.fail) for w in MATRICES], BATCHES, QUICK)


def test_a_tied_matrix_is_written_once_dense_or_quantized_where_a_rule_names_it():
    model = ZOO["llama_tied"]()
    for rules, quantized in (((), False), ((awq.Rule("^embed$", bits=8),), True)):
        written = []
        recipe = replace(QUICK, rules=rules)
        done = stream(
            model.fn, model.params, [model.inputs], recipe, lambda n, w, written=written: written.append((n, w))
        )
        (embed,) = [w for name, w in written if name == "embed"]
        assert is_quantized(embed) == quantized
        (report,) = [r for r in done.reports if r.name == "embed"]
        assert "also used by gather" in report.note


def test_params_that_nothing_reads_are_handed_over_as_they_are():
    fn = loose(lambda p, x: mixed(p["w"], x))
    done = stream(fn, {"w": MATRICES[0], "other": MATRICES[1]}, BATCHES, QUICK)
    np.testing.assert_array_equal(done.params["other"], MATRICES[1])


BROKEN = [MATRICES[0], np.where(np.eye(WIDTH), np.nan, MATRICES[1]).astype(np.float32), *MATRICES[2:]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((IN_MEMORY.fn, MATRICES, [], QUICK), "No calibration batch was given"),
        ((IN_MEMORY.fn, MATRICES, [X], QUICK), "A batch is a tuple of inputs"),
        ((IN_MEMORY.fn, MATRICES, [(X[:, :5],)], QUICK), "Batch 1: the function cannot take .*float32.*5, 5"),
        ((IN_MEMORY.fn, MATRICES, [(X * np.nan,)], QUICK), "Batch 1: input 0 holds NaN"),
        ((IN_MEMORY.fn, BROKEN, BATCHES, QUICK), "^1: 32 of 1024 weights are NaN"),
        ((lambda p, x: x * p[None], X[0], BATCHES, QUICK), "nothing to quantize"),
        ((IN_MEMORY.fn, MATRICES, BATCHES, replace(QUICK, rules=(awq.Rule("x", bits=8),))), "matches none of the 4"),
    ],
)
def test_what_cannot_be_streamed_is_told(arguments, says):
    with pytest.raises(ValueError, match=says):
        stream(*arguments)


def test_an_error_names_the_param_of_its_segment():
    def solve(params, calibration, recipe):
        raise ValueError(f"{slot(0)}: no")

    model = ZOO["llama"]()
    with pytest.raises(ValueError, match="embed: no"):
        stream(model.fn, model.params, [(TOKENS,)], QUICK, solve=solve)


def test_a_fold_that_spans_too_far_is_refused_with_a_reason():
    model = BLOCKS["encoder_decoder"]()
    found = segments(model.fn, model.params, *model.inputs)
    refused = {
        str(p): s.traced.sites[slot(k)].refused
        for s in found.segments
        for k, p in enumerate(s.params)
        if slot(k) in s.traced.sites
    }
    assert {refused[name] for name in FAR["encoder_decoder"]} == {"no op before it could take a scale"}

"""quantize from end to end: nearer to the dense model than rounding, by the rules, and saying what it did."""

import dataclasses
import functools as ft
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import zoo
from compilations import compilations
from jax import lax
from quick import quick_compilation, quick_jit
from reference import problem

from awq_jax import PRESETS, QuantSpec, Recipe, Rule, calibrate, quantize, quantized, sites
from awq_jax.kernels import unpack
from awq_jax.search import Golden, Gradient, Grid, Importance, Joint, LearnedClip, Signed, no_clip, to_nearest
from awq_jax.transforms.quantize import SiteReport, plan
from awq_jax.weights.paths import named_leaves

G32 = Recipe(group_size=32)
CHEAP = dataclasses.replace(G32, rounding=to_nearest)
PLAIN = dataclasses.replace(CHEAP, scale=Grid((0.0,)), clip=no_clip)


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compilation():
        yield


def stored(q):
    """The matrix (i, o) of codes, steps and zeros that `q` holds, in numpy; its input scale is not applied."""
    codes = np.asarray(unpack(q.codes, q.spec.bits), np.float32)[..., : q.in_features, :]
    zeros = np.full(q.scales.shape, q.spec.middle) if q.zeros is None else np.asarray(q.zeros)
    rows = lambda a: np.repeat(np.float32(a), q.spec.group(q.in_features), -2)[..., : q.in_features, :]
    return (codes - rows(zeros)) * rows(q.scales)


@ft.cache
def one_site():
    """A function that is one matmul, its params, its inputs and its calibration."""
    x, w = problem(64)
    fn = lambda p, x: x @ p["w"]
    return fn, {"w": w}, x, calibrate(fn, {"w": w}, [(x,)], block=None)


def square_layer(draw):
    """A Llama's layer of which every matrix has one shape, so that it is searched with one program."""
    square = lambda: draw.matrix(zoo.WIDTH, zoo.WIDTH)
    norms = {name: np.exp(3 * draw.vector(zoo.WIDTH)) for name in ("attn_norm", "mlp_norm")}
    return norms | {"attn": {n: square() for n in "qkvo"}, "mlp": {n: square() for n in ("gate", "up", "down")}}


TOKENS = np.random.default_rng(0).integers(0, zoo.VOCAB, (4, 16), dtype=np.int32)


def square_llama():
    draw = zoo.Draw()
    return zoo.decoder(zoo.llama_block, zoo.normed_head, square_layer, draw, zoo.norm_and_head(draw), zoo.LAYERS)


def square_llama_scanned():
    return zoo.scanned(zoo.llama_block, zoo.normed_head, square_llama())


def nearest_in_numpy(model):
    """The params of `model` with all sites but the head rounded to nearest."""
    leaves = named_leaves(model.params)
    for name in sites(model.fn, model.params, TOKENS).sites:
        if name != "head":
            stack = leaves[name].reshape(-1, *leaves[name].shape[-2:])
            rounded = np.stack([reference.nearest(w, QuantSpec(4, 32)) for w in stack])
            leaves[name] = rounded.reshape(leaves[name].shape)
    return jax.tree.unflatten(jax.tree.structure(model.params), list(leaves.values()))


@pytest.mark.parametrize(
    ("build", "recipe"),
    [
        (square_llama, G32),
        (square_llama, dataclasses.replace(CHEAP, scales="both")),
        (square_llama_scanned, CHEAP),
        (square_llama_scanned, dataclasses.replace(CHEAP, scales="both")),
    ],
    ids=["unrolled", "unrolled, folded", "scanned", "scanned, folded"],
)
def test_a_decoder_is_nearer_than_rounded_to_nearest(build, recipe):
    model = build()
    calibration = calibrate(model.fn, model.params, [(TOKENS,)], block=None)
    recipe = dataclasses.replace(recipe, rules=(Rule("head", skip=True),))
    qparams, report = quantize(model.params, calibration, recipe)

    run = quick_jit(model.fn)
    dense, nearest = (run(p, TOKENS) for p in (model.params, nearest_in_numpy(model)))
    found = quick_jit(quantized(model.fn))(qparams, TOKENS)
    assert np.square(found - dense).mean() < 0.8 * np.square(nearest - dense).mean()

    report, left = [r for r in report if r.spec], [r for r in report if not r.spec]
    assert {r.name for r in report} == set(calibration.traced.sites) - {"head"}
    assert [(r.name, r.note) for r in left] == [("embed", "left dense: not a matmul's: gather")]
    leaves, before = named_leaves(qparams), named_leaves(model.params)
    assert all((leaves[r.name].input_scale is None) == recipe.folds for r in report)
    moved = {name for name in leaves if name.endswith("norm") and (leaves[name] != before[name]).any()}
    assert moved == ({name for name in before if name.endswith("_norm")} if recipe.folds else set())


def mlp(p, x):
    return x + jax.nn.relu(zoo.rms(x, p["norm"]) @ p["up"]) @ p["down"]


MLP = {
    "norm": np.linspace(0.7, 1.3, 64, dtype=np.float32),
    "up": problem(64, 64)[1],
    "down": problem(64, 64, seed=1)[1],
}
HIDDEN = problem(64)[0]


@ft.cache
def mlp_calibration():
    return calibrate(mlp, MLP, [(HIDDEN,)], block=None)


def layers(p, x):
    return lax.scan(lambda x, layer: (mlp(layer, x), None), x, p)[0]


@pytest.mark.parametrize("fold", [False, True], ids=["scale a site", "folded"])
def test_scanned_layers_are_quantized_like_each_alone(fold):
    recipe = dataclasses.replace(CHEAP, scales="both" if fold else "beside")
    stack = jax.tree.map(lambda w: np.stack([w, w[::-1]]), MLP)
    found, report = quantize(stack, calibrate(layers, stack, [(HIDDEN,)], block=None), recipe)
    x = HIDDEN
    for k in range(2):
        layer = jax.tree.map(lambda w, k=k: w[k], stack)
        alone, _ = quantize(layer, calibrate(mlp, layer, [(x,)], block=None), recipe)
        agree = jax.tree.map(lambda a, b, k=k: np.isclose(a[k], b, rtol=1e-3).mean(), found, alone)
        assert min(jax.tree.leaves(agree)) > 0.99
        x = mlp(layer, x)
    assert [r.name for r in report] == ["up", "down"]


def test_layers_of_a_scan_are_searched_with_one_program():
    stack = jax.tree.map(lambda w: np.stack([w, w[::-1]]), MLP)
    calibration = calibrate(layers, stack, [(HIDDEN,)], block=None)
    recipe = dataclasses.replace(PLAIN, scale=Grid((0.0, 0.4)))
    with compilations() as first:
        quantize(stack, calibration, recipe)
    with compilations() as second:
        quantize(stack, calibration, recipe)
    assert first["solve_sites"] == 1
    assert not second


def test_what_is_stored_is_what_the_report_says():
    _, params, x, calibration = one_site()
    qparams, (report,) = quantize(params, calibration, G32)
    q = qparams["w"]
    assert (report.name, report.spec, report.note) == ("w", QuantSpec(4, 32), "")
    change = stored(q) * np.asarray(q.input_scale)[:, None] - params["w"]
    energy = reference.output_errors(x, params["w"]).sum()
    assert report.error == pytest.approx(reference.output_errors(x, change).sum() / energy, rel=1e-2)
    np.testing.assert_allclose(q.dequantize(), params["w"] + change, rtol=1e-4, atol=1e-6)
    nearest = reference.nearest(params["w"], QuantSpec(4, 32)) - params["w"]
    assert report.nearest_error == pytest.approx(reference.output_errors(x, nearest).sum() / energy, rel=1e-2)
    assert report.error < report.nearest_error


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_and_is_no_worse_than_rounding_to_nearest(name):
    _, params, x, calibration = one_site()
    q = quantize(params, calibration, dataclasses.replace(PRESETS[name], group_size=32))[0]["w"]
    nearest = reference.nearest(params["w"], QuantSpec(4, 32))
    error = reference.output_errors(x, np.asarray(q.dequantize()) - params["w"]).sum()
    bound = reference.output_errors(x, nearest - params["w"]).sum()
    if name == "rtn":
        np.testing.assert_allclose(q.dequantize(), nearest, rtol=1e-5, atol=1e-6)
    else:
        assert error < 0.95 * bound


def inverse_root(w, moments, spec):
    return 1 / jnp.sqrt(jnp.arange(1.0, len(w) + 1))


def most_of_the_range(w, moments, spec):
    return tuple(0.9 * a for a in no_clip(w, moments, spec))


def finer(w, low, high, moments, spec):
    return to_nearest(w, 0.95 * low, 0.95 * high, moments, spec)


@pytest.mark.parametrize(("changes", "ratio"), [({"clip": most_of_the_range}, 0.9), ({"rounding": finer}, 0.95)])
def test_strategies_may_be_anyones_functions(changes, ratio):
    _, params, _, calibration = one_site()
    plain, found = (quantize(params, calibration, dataclasses.replace(PLAIN, **c))[0]["w"] for c in ({}, changes))
    ratios = np.asarray(found.scales, np.float32) / np.asarray(plain.scales, np.float32)
    taken = np.isclose(ratios, ratio, rtol=2e-3)
    # Columns that end worse than rounded to nearest are rounded to nearest.
    assert (taken | np.isclose(ratios, 1, rtol=2e-3)).all()
    assert taken.all(0).any()


def test_a_recipe_takes_functions_only():
    with pytest.raises(ValueError, match=r"Recipe\.scale='grid' is not a hashable function"):
        Recipe(scale="grid")


def planned(*rules):
    return plan(mlp_calibration(), Recipe(rules=rules))


def test_rules_skip_and_change_and_the_last_wins():
    base = QuantSpec()
    assert planned().specs == {"up": base, "down": base}
    assert planned(Rule("up", skip=True)).specs == {"down": base}
    assert planned(Rule("^u", bits=8), Rule("n$", group_size=32)).specs == {
        "up": QuantSpec(8, 128),
        "down": QuantSpec(4, 32),
    }
    assert planned(Rule(".", skip=True), Rule("up", symmetric=True)).specs == {"up": QuantSpec(4, 128, True)}
    assert planned(Rule("up", symmetric=True), Rule(".", skip=True)).specs == {}


def test_rules_and_unclipped_see_the_prefix():
    found = plan(mlp_calibration(), Recipe(rules=(Rule("^layers_1/up", skip=True),), unclipped="1/d"), "layers_1/")
    assert set(found.specs) == {"down"}
    assert found.clips == {"down": no_clip}
    assert set(plan(mlp_calibration(), Recipe(rules=(Rule("^layers_1/up", skip=True),)), "layers_2/").specs) == {
        "up",
        "down",
    }


MISTAKES = {
    "w was calibrated, the params have v": lambda w, c: quantize({"v": w}, c, G32),
    "w is quantized already": lambda w, c: quantize(quantize({"w": w}, c, G32)[0], c, G32),
    r"w has shape \(64, 9\), calibrated was": lambda w, c: quantize({"w": np.ones((64, 9), np.float32)}, c, G32),
    "recipe='rtn': give an awq.Recipe": lambda w, c: quantize({"w": w}, c, "rtn"),
    "rules=Rule.*: give a tuple of rules": lambda w, c: Recipe(rules=Rule("w", bits=8)),
    "w is quantized: give the dense params": lambda w, c: calibrate(c.fn, quantize({"w": w}, c, G32)[0], [c.example]),
    r"Batch 2: the function cannot take inputs of shapes \[\(5, 7\)\]": lambda w, c: calibrate(
        c.fn, {"w": w}, [c.example, (np.ones((5, 7), np.float32),)]
    ),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    _, params, _, calibration = one_site()
    with pytest.raises(ValueError, match=message):
        MISTAKES[message](params["w"], calibration)


def test_skipped_sites_stay_the_very_params_they_were():
    recipe = dataclasses.replace(CHEAP, rules=(Rule("down", skip=True),))
    qparams, report = quantize(MLP, mlp_calibration(), recipe)
    assert qparams["down"] is MLP["down"]
    assert qparams["norm"] is MLP["norm"]
    assert [r.name for r in report] == ["up"]


def test_bits_and_symmetry_are_those_of_the_rule():
    recipe = dataclasses.replace(PLAIN, rules=(Rule("up", bits=3, symmetric=True), Rule("down", bits=8, group_size=-1)))
    qparams, _ = quantize(MLP, mlp_calibration(), recipe)
    for name, spec in (("up", QuantSpec(3, 32, True)), ("down", QuantSpec(8, -1))):
        q = qparams[name]
        assert q.spec == spec
        assert (q.zeros is None) == spec.symmetric
        expected = reference.nearest(MLP[name], spec)
        np.testing.assert_allclose(q.dequantize(), expected, rtol=1e-4, atol=1e-5)


def test_fewer_bits_err_more():
    _, params, _, calibration = one_site()
    errors = [quantize(params, calibration, dataclasses.replace(PLAIN, bits=bits))[1][0].error for bits in (3, 4)]
    assert errors[0] > 2 * errors[1]


NOT_FOLDED = {
    "different specs": (
        lambda p, x: (zoo.rms(x, p["norm"]) @ p["a"], zoo.rms(x, p["norm"]) @ p["b"]),
        {"norm": np.ones(32, np.float32), "a": np.eye(32, dtype=np.float32), "b": np.eye(32, dtype=np.float32)},
        (Rule("a", bits=8),),
        {"a": "its sites have different specs", "b": "its sites have different specs"},
    ),
    "different channels": (
        lambda p, x: (zoo.rms(x, p["norm"])[:, :16] @ p["a"], zoo.rms(x, p["norm"]) @ p["b"]),
        {"norm": np.ones(32, np.float32), "a": np.eye(16, dtype=np.float32), "b": np.eye(32, dtype=np.float32)},
        (),
        {"a": "its sites read different channels", "b": "its sites read different channels"},
    ),
    "another order": (
        lambda p, x: (zoo.rms(x, p["norm"])[:, ::-1] @ p["a"], zoo.rms(x, p["norm"]) @ p["b"]),
        {"norm": np.ones(32, np.float32), "a": np.eye(32, dtype=np.float32), "b": np.eye(32, dtype=np.float32)},
        (),
        {"a": "its sites read different channels", "b": "its sites read different channels"},
    ),
    "nothing before": (lambda p, x: x @ p["a"], {"a": np.eye(32, dtype=np.float32)}, (), {"a": "no op before"}),
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_what_is_not_folded_says_why(name):
    fn, params, rules, notes = NOT_FOLDED[name]
    calibration = calibrate(fn, params, [(HIDDEN[:, :32],)])
    found = plan(calibration, dataclasses.replace(PLAIN, scales="both", rules=rules))
    assert found.folds == ()
    assert found.notes.keys() == notes.keys()
    assert all(found.notes[site].startswith(f"not folded: {why}") for site, why in notes.items())


def test_a_site_that_cannot_be_folded_keeps_its_scale_beside():
    fn = lambda p, x: (zoo.rms(x, p["norm"]) @ p["a"], jnp.abs(x) @ p["b"])
    params = {"norm": MLP["norm"], "a": MLP["up"], "b": MLP["down"]}
    calibration = calibrate(fn, params, [(HIDDEN,)], block=None)
    folded = dataclasses.replace(CHEAP, scales="both")
    qparams, _ = quantize(params, calibration, folded)
    alone, _ = quantize(params, calibration, CHEAP)
    assert qparams["a"].input_scale is None
    assert (qparams["b"].input_scale != 1).any()
    np.testing.assert_array_equal(qparams["b"].dequantize(), alone["b"].dequantize())
    for fold in (False, True):
        bare, _ = quantize(params, calibration, dataclasses.replace(CHEAP, scales="folded" if fold else "none"))
        assert bare["a"].input_scale is None
        assert bare["b"].input_scale is None
        assert (bare["norm"] != params["norm"]).any() == fold


def test_a_site_that_cannot_be_folded_is_quantized_all_the_same():
    _, params, _, calibration = one_site()
    qparams, (report,) = quantize(params, calibration, dataclasses.replace(PLAIN, scales="both"))
    assert report.note.startswith("not folded")
    np.testing.assert_allclose(qparams["w"].dequantize(), reference.nearest(params["w"], QuantSpec(4, 32)), atol=1e-6)


def test_a_fold_with_a_skipped_site_scales_it_too():
    fn = lambda p, x: (zoo.rms(x, p["norm"]) @ p["a"], zoo.rms(x, p["norm"]) @ p["b"])
    params = {"norm": MLP["norm"], "a": MLP["up"], "b": MLP["down"]}
    recipe = dataclasses.replace(CHEAP, scales="both", rules=(Rule("b", skip=True),))
    qparams, _ = quantize(params, calibrate(fn, params, [(HIDDEN,)], block=None), recipe)
    factor = params["norm"] / np.asarray(qparams["norm"])
    assert factor.max() > 1.2 * factor.min()
    np.testing.assert_allclose(qparams["b"], params["b"] * factor[:, None], rtol=1e-4)
    np.testing.assert_allclose(fn(qparams | {"a": params["a"]}, HIDDEN)[1], fn(params, HIDDEN)[1], rtol=1e-2, atol=1e-4)


def test_a_wrong_fold_is_caught(monkeypatch):
    wrong = lambda params, factors, folds: params | {"norm": params["norm"] * 2}
    monkeypatch.setattr(sys.modules["awq_jax.transforms.folding"], "fold", wrong)
    with pytest.raises(ValueError, match="into the op before changed the function"):
        quantize(MLP, mlp_calibration(), dataclasses.replace(CHEAP, scales="both"))


@pytest.mark.parametrize("fold", [False, True])
def test_weights_that_are_no_numbers_are_named(fold):
    bad = MLP["down"].copy()
    bad[3, 2], bad[5, 1] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"^down: 2 of 4096 weights are NaN or infinite"):
        quantize(
            MLP | {"down": bad}, mlp_calibration(), dataclasses.replace(CHEAP, scales="both" if fold else "beside")
        )


def nothing(w, moments, spec):
    return jnp.full(len(w), jnp.nan)


def test_a_strategy_without_an_answer_is_an_error():
    _, params, _, calibration = one_site()
    with pytest.raises(ValueError, match=r"^w: .*the strategy divides by zero"):
        quantize(params, calibration, dataclasses.replace(CHEAP, scale=nothing))


def test_a_scale_that_ends_worse_than_rounding_to_nearest_is_not_used():
    """A scale is accepted by the groups' own Gram blocks; with one factor in all channels they are not all there is."""
    rng = np.random.default_rng(38)
    x = rng.normal(size=(200, 1)) + 0.1 * rng.normal(size=(200, 64))
    w, s = rng.normal(size=(64, 1)), np.exp(0.3 * rng.normal(size=64))
    x, w, s = (np.asarray(a, np.float32) for a in (x, w, s))
    calibration = calibrate(lambda p, x: x @ p, w, [(x,)], block=None)
    recipe = dataclasses.replace(PLAIN, scale=lambda w, moments, spec: jnp.asarray(s), rounding=to_nearest)
    q, (report,) = quantize(w, calibration, recipe)
    spec = QuantSpec(4, 32)
    scaled = reference.nearest(w * s[:, None], spec) / s[:, None]
    plain = reference.nearest(w, spec)
    by_group = lambda m: sum(np.square(x[:, k] @ (m - w)[k]).sum() for k in (slice(0, 32), slice(32, 64)))
    assert by_group(scaled) < by_group(plain)
    assert np.square(x @ (scaled - w)).sum() > np.square(x @ (plain - w)).sum()
    np.testing.assert_allclose(q.dequantize(), plain, atol=1e-6)
    np.testing.assert_array_equal(q.input_scale, 1)
    assert report.error == report.nearest_error


def test_a_dead_channel_is_none():
    fn, params, x, _ = one_site()
    dead = np.where(np.arange(64) % 5 == 0, 0, x).astype(np.float32)
    qparams, (report,) = quantize(params, calibrate(fn, params, [(dead,)], block=None), G32)
    assert report.note == ""
    assert 0 < report.error < report.nearest_error
    change = np.abs(np.asarray(qparams["w"].dequantize()) - params["w"])
    assert np.isfinite(change).all()
    assert change.max() < np.abs(params["w"]).max()


def test_experts_that_no_token_reached_are_rounded_to_nearest():
    w = np.stack([problem(64, 6, seed=k)[1] for k in range(3)])
    fn = lambda p, x: jnp.einsum("eti,eio->eto", x, p)
    calibration = calibrate(fn, w, [(np.zeros((3, 5, 64), np.float32),)], block=None)
    q, (report,) = quantize(w, calibration, CHEAP)
    assert report.note == "3 of 3 reached by no token (0, 1, 2): rounded by their weights alone"
    expected = np.stack([reference.nearest(m, QuantSpec(4, 32)) for m in w])
    np.testing.assert_allclose(stored(q), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(q.input_scale, 1)


def test_layouts_and_dtypes_are_kept():
    fn = lambda p, x: jnp.einsum("tnd,ndo->to", jnp.einsum("ti,ind->tnd", x, p["in"].astype(jnp.float32)), p["out"])
    draw = zoo.Draw()
    params = {"in": jnp.asarray(draw.matrix(32, 4, 8, fan_in=32), jnp.bfloat16), "out": draw.matrix(4, 8, 32)}
    x = HIDDEN[:, :32]
    qparams, _ = quantize(params, calibrate(fn, params, [(x,)], block=None), PLAIN)
    assert {k: (q.shape, q.dtype) for k, q in qparams.items()} == {k: (w.shape, w.dtype) for k, w in params.items()}
    dense = {k: q.dequantize() for k, q in qparams.items()}
    np.testing.assert_allclose(dense["out"], params["out"], atol=0.1 * np.abs(params["out"]).max())
    expected = np.asarray(fn(dense, x))
    np.testing.assert_allclose(quantized(fn)(qparams, x), expected, atol=1e-2 * np.abs(expected).max())


def test_a_weight_in_a_scan_of_a_scan():
    def fn(p, x):
        layer = lambda x, w: (jnp.tanh(x @ w), None)
        return lax.scan(lambda x, ws: lax.scan(layer, x, ws), x, p)[0]

    w = zoo.Draw().matrix(2, 3, 32, 32)
    q, (report,) = quantize(w, calibrate(fn, w, [(HIDDEN[:, :32],)], block=None), PLAIN)
    assert q.codes.shape[:2] == (2, 3)
    expected = [[reference.nearest(m, QuantSpec(4, 32)) for m in row] for row in w]
    np.testing.assert_allclose(q.dequantize(), expected, rtol=1e-4, atol=1e-6)
    assert report.note == ""


def test_a_tied_embedding_stays_dense_unless_a_rule_names_it():
    fn = lambda p, tokens: jnp.tanh(p["embed"][tokens]) @ p["embed"].T
    params = {"embed": zoo.Draw().matrix(64, 32)}
    calibration = calibrate(fn, params, [(np.arange(64),)], block=None)
    q, (report,) = quantize(params, calibration, PLAIN)
    assert q["embed"] is params["embed"]
    assert report.spec is None
    assert report.note == "left dense: also used by gather; a rule that names it quantizes it"
    recipe = dataclasses.replace(PLAIN, rules=(Rule("embed", bits=8),))
    q, (report,) = quantize(params, calibration, recipe)
    assert q["embed"].spec.bits == 8
    assert report.note == "quantized as a rule names it: also used by gather"
    same = np.abs(quantized(fn)(q, np.arange(64)) - fn(params, np.arange(64)))
    assert same.max() < 0.05


@pytest.mark.parametrize(
    "recipe",
    [
        G32,
        dataclasses.replace(G32, scales="both"),
        dataclasses.replace(
            G32, scale=Gradient(iterations=2), clip=LearnedClip(iterations=2), rounding=Signed(iterations=2)
        ),
        dataclasses.replace(CHEAP, scale=Joint(), clip=Importance()),
        dataclasses.replace(CHEAP, scale=Golden()),
    ],
)
def test_quantized_alike_in_64_bits(recipe):
    """jax_enable_x64 makes of every number that has no dtype one of 64 bits."""
    before, _ = quantize(MLP, mlp_calibration(), recipe)
    jax.config.update("jax_enable_x64", True)
    try:
        found, _ = quantize(MLP, mlp_calibration.__wrapped__(), recipe)
    finally:
        jax.config.update("jax_enable_x64", False)
    assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [leaf.dtype for leaf in jax.tree.leaves(before)]
    for name in ("up", "down"):
        a, b = (np.asarray(q[name].dequantize()) for q in (found, before))
        assert np.abs(a - b).mean() < 0.01 * np.abs(b).mean()


def test_a_report_reads_as_a_line():
    spec = QuantSpec(4, 64)
    assert str(SiteReport("a", spec, 0.0062, 0.0133)) == "a: 4 bits in groups of 64; error 0.62%, to nearest 1.33%"
    assert (
        str(SiteReport("a", spec, 0.5, 0.5, "why")) == "a: 4 bits in groups of 64; error 50.00%, to nearest 50.00%; why"
    )
    assert str(SiteReport("a", None, 0.0, 0.0, "left dense: it is a router")) == "a: left dense: it is a router"


def test_a_rule_that_matches_nothing_is_refused():
    recipe = dataclasses.replace(CHEAP, rules=(Rule("dwon", skip=True),))
    with pytest.raises(ValueError, match=r"rule 'dwon' matches none of the 2 sites: up, down\. Rules are regular"):
        quantize(MLP, mlp_calibration(), recipe)


def test_a_rule_that_matches_what_is_no_site_is_told_why():
    fn = lambda p, x: (x * p["table"][:6]) @ p["up"]
    params = {"table": np.ones((12, 6), "f4"), "up": np.eye(6, dtype="f4")}
    recipe = dataclasses.replace(CHEAP, rules=(Rule("table", bits=8),))
    with pytest.raises(ValueError, match=r"sites: up\. It matches table \(slice\), which cannot be quantized"):
        quantize(params, calibrate(fn, params, [(np.eye(6, dtype="f4"),)]), recipe)

"""Bits by site: the knapsack against trying everything, the errors against numpy, the budget kept."""

import itertools
import re
import sys
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from commands import run
from hypothesis import given, settings
from hypothesis import strategies as st

import awq_jax as awq
from awq_jax.transforms.mixed_bits import (
    CHOICES,
    Group,
    Offer,
    allocate,
    quantized_alone,
    relative_error,
    with_average_bits,
)
from awq_jax.weights.paths import named_leaves
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import is_quantized, round_to_nearest

NEAREST = replace(awq.PRESETS["rtn"], group_size=32)


def falling(start, ratios):
    return tuple(float(e) for e in start * np.cumprod([1.0, *ratios]))


OFFERS = st.lists(
    st.builds(
        lambda weights, start, ratio: Offer(Group(("x",), weights), falling(start, [ratio] * 5)),
        st.integers(1, 50), st.floats(0.01, 1), st.floats(0.1, 0.6),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(OFFERS, st.floats(2, 8))
def test_the_knapsack_is_near_the_best_there_is(offered, average):
    offered = [Offer(Group((str(k),), o.group.weights), o.errors) for k, o in enumerate(offered)]
    bits = allocate(offered, average)
    spent = sum(bits[o.group.sites[0]] * o.group.weights for o in offered)
    budget = average * sum(o.group.weights for o in offered)
    assert spent <= budget + 1e-3
    found = sum(o.errors[CHOICES.index(bits[o.group.sites[0]])] for o in offered)
    every = [
        sum(o.errors[CHOICES.index(b)] for o, b in zip(offered, chosen, strict=True))
        for chosen in itertools.product(CHOICES, repeat=len(offered))
        if sum(b * o.group.weights for o, b in zip(offered, chosen, strict=True)) <= budget
    ]
    least, most = min(every), max(every)
    assert found <= least + 0.35 * (most - least) + 1e-6


def test_whole_averages_of_equal_sites_are_shared_out_evenly():
    alike = [Offer(Group((str(k),), 10), falling(1, [0.25] * 5)) for k in range(3)]
    assert set(allocate(alike, 4).values()) == {4}


@pytest.mark.parametrize("average", [1.9, 8.1])
def test_an_average_out_of_range(average):
    with pytest.raises(ValueError, match=f"{average} bits on average: give 2 to 8"):
        allocate([], average)


def test_what_cannot_be_measured_is_told_before_the_search(monkeypatch):
    w, x = np.eye(32, dtype="f4"), np.ones((4, 32), "f4")
    fn = lambda p, x: (x @ p).astype(int)
    calibration = awq.calibrate(fn, w, [(x,)])
    with pytest.raises(ValueError, match=r"9 bits on average"):
        with_average_bits(w, calibration, 9)
    with pytest.raises(ValueError, match=r"give the same params"):
        with_average_bits({"w": w}, calibration, 3.5)
    monkeypatch.setattr(sys.modules["awq_jax.transforms.mixed_bits"], "quantize", None)
    with pytest.raises(ValueError, match=r"returns integers alone: let it return logits"):
        with_average_bits(w, calibration, 3.5, awq.Recipe(group_size=32))


def zoo_calibration(name):
    model = zoo.ZOO[name]()
    return model, awq.calibrate(model.fn, model.params, [model.inputs], block=None)


@pytest.mark.parametrize("name", ["llama", "llama_scanned", "moe_scanned"])
def test_the_average_is_kept(name):
    model, calibration = zoo_calibration(name)
    recipe = replace(NEAREST, rules=(awq.Rule("head", bits=8), awq.Rule("/o", skip=True)))
    found = with_average_bits(model.params, calibration, 3.3, recipe)
    q, report = awq.quantize(model.params, calibration, found)
    sizes = {r.name: r.spec for r in report if r.spec and r.name != "head"}
    leaves = named_leaves(q)
    total = sum(leaves[n].size for n in sizes)
    mean = sum(leaves[n].size * spec.bits for n, spec in sizes.items()) / total
    assert 2.7 < mean <= 3.3
    assert len({spec.bits for spec in sizes.values()}) > 1
    assert leaves["head"].spec.bits == 8
    assert not any(is_quantized(leaf) for n, leaf in leaves.items() if n.endswith("/o"))
    groups = {}
    for n, spec in sizes.items():
        groups.setdefault(calibration.traced.sites[n].group, set()).add(spec.bits)
    assert all(len(bits) == 1 for bits in groups.values())


def test_errors_fall_with_the_square_of_the_step():
    w = np.random.default_rng(0).normal(size=(512, 64)).astype("f4")
    offer = Offer.of(Group(("w",), w.size), 1.0)
    lost = [np.square(np.asarray(round_to_nearest(w, QuantSpec(bits, 64)).dequantize()) - w).sum() for bits in CHOICES]
    np.testing.assert_allclose(offer.errors, np.array(lost) / lost[CHOICES.index(3)], rtol=0.03)


def test_one_group_is_quantized_at_a_time():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 64)).astype("f4")
    params = {k: rng.normal(size=(64, 32)).astype("f4") for k in "abc"}
    fn = lambda p, x: (x @ p["a"], x @ p["b"], jnp.tanh(2 * x) @ p["c"])
    recipe = awq.Recipe(group_size=32, scales="both")
    calibration = awq.calibrate(fn, params, [(x,)])
    found = {group.sites: (group, p) for group, p in quantized_alone(params, calibration, recipe)}
    assert set(found) == {("a", "b"), ("c",)}
    alone = awq.quantize(params, calibration, awq.Recipe(bits=3, group_size=32))[0]
    for sites, (group, p) in found.items():
        assert group.weights == 64 * 32 * len(sites)
        for name in params:
            expected = alone[name].dequantize() if name in sites else params[name]
            np.testing.assert_array_equal(p[name], expected)


def test_the_error_of_outputs_is_relative_by_vector():
    rng = np.random.default_rng(0)
    exact = {"y": rng.normal(size=(3, 5, 8)) * [[[1], [10], [100], [1], [0]]], "n": np.arange(3), "loss": np.array(2.0)}
    changed = {"y": exact["y"] + rng.normal(size=(3, 5, 8)), "n": np.arange(3) + 7, "loss": np.array(3.0)}
    energy = np.square(exact["y"]).sum(-1)[:, :4]
    each = np.square(changed["y"] - exact["y"]).sum(-1)[:, :4] / energy
    assert relative_error(changed, exact) == pytest.approx((each.sum() + 0.25) / 16, rel=1e-5)


def test_a_block_whose_output_is_lost_in_the_residual_gets_fewer_bits():
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=(64, 64)).astype("f4") / 8 for k in ("loud", "faint")}
    fn = lambda p, x: x + x @ p["loud"] + 0.01 * (x @ p["faint"])
    x = rng.normal(size=(50, 64)).astype("f4")
    rules = (awq.Rule("faint", group_size=64),)  # so that it is a group of its own
    recipe = with_average_bits(params, awq.calibrate(fn, params, [(x,)]), 4, awq.Recipe(group_size=32, rules=rules))
    assert recipe.spec_of("loud").bits > 4 > recipe.spec_of("faint").bits


def test_the_command_takes_a_fraction(tmp_path):
    from checkpoints import tiny_folder

    model = tiny_folder(tmp_path / "in")
    options = ("--group-size", "32", "--samples", "2", "--seq-len", "32")
    out = run("quantize", model, tmp_path / "out", "--bits", "3.5", "--format", "orbax", *options)
    assert out.code == 0, out.err
    params = awq.load(tmp_path / "out").params
    leaves = [w for n, w in named_leaves(params).items() if is_quantized(w)]
    mean = sum(w.size * w.spec.bits for w in leaves) / sum(w.size for w in leaves)
    assert 3 < mean <= 3.5
    refused = run("quantize", model, tmp_path / "awq", "--bits", "3.5", *options)
    assert refused.code == 2
    assert re.search("3.5 bits on average: an AutoAWQ file has one width, use --format orbax", refused.err)


def test_rules_named_like_sites_and_groups_of_their_own():
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=(64, 32)).astype("f4") for k in "ab"}
    x = rng.normal(size=(50, 64)).astype("f4")
    calibration = awq.calibrate(lambda p, x: (x @ p["a"], x @ p["b"]), params, [(x,)])
    recipe = replace(NEAREST, rules=(awq.Rule("^a$", symmetric=True), awq.Rule("b", group_size=64)))
    found = with_average_bits(params, calibration, 3.5, with_average_bits(params, calibration, 5, recipe))
    q, _ = awq.quantize(params, calibration, found)
    assert (q["a"].spec.symmetric, q["b"].spec.group_size) == (True, 64)
    assert len([*quantized_alone(params, calibration, recipe)]) == 2

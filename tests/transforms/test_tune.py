"""Tuning: what is timed, what is kept, and that later programs take it."""

import dataclasses
import importlib
import json
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run

import awq_jax as awq
from awq_jax.errors import InputError
from awq_jax.kernels import grouped_int4_matmul, int4_matmul, shared_int4_matmul, target
from awq_jax.kernels.tilings import table
from awq_jax.kernels.tilings.table import Case, Tiling
from awq_jax.kernels.triton import launch
from awq_jax.kernels.triton import matmul as triton
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import in_tiles, round_to_nearest

tune = importlib.import_module("awq_jax.transforms.tune")
SHAPE = {"dtype": "bfloat16", "group": 128, "k": 256, "n": 384}
CASE = Case(arch=90, m=64, **SHAPE)
FAST = Tiling("mosaic", 64, 128, 12, 6)
RULE = table.rule(90, "bfloat16", 128, 64, 384)


@pytest.fixture(autouse=True)
def file(monkeypatch, tmp_path):
    """A user without tilings, and with the packages."""
    monkeypatch.setattr(table, "users_file", lambda: tmp_path / "cache" / "tilings.jsonl")
    monkeypatch.setattr(launch, "missing", lambda: None)
    empty = lambda one: jnp.zeros(one.shape, one.dtype)
    monkeypatch.setattr(triton, "launch", lambda *_, out, **__: jax.tree.map(empty, out))
    table.remembered.cache_clear()
    yield table.users_file()
    table.remembered.cache_clear()


@pytest.fixture
def clock(monkeypatch):
    """One kernel is twice as fast as what served before."""

    def timings(case, before, weights):
        assert weights[0].shape == (case.k, case.n)
        return tune.Tuned(case, before, {FAST: 1e-6, before: 2e-6}, {})

    monkeypatch.setattr(tune, "ROTATED", 1)
    monkeypatch.setattr(tune, "timings", timings)


def weight(k: int = 256, n: int = 384):
    return in_tiles(round_to_nearest(np.ones((k, n), np.float32), QuantSpec(4, 128)))


def rows(m: int, k: int = 256):
    return jax.ShapeDtypeStruct((m, k), jnp.bfloat16)


def taken(m: int = 64, **shape: int) -> Tiling:
    return table.tiling(arch=90, m=m, **(SHAPE | shape))


def test_what_is_timed():
    def kernels(m: int, arch: int = 90) -> set[str]:
        return {t.kernel for t in tune.candidates(Case(arch, "bfloat16", 128, m, 4096, 4096))}

    assert [kernels(m) for m in (1, 64, 1024)] == [{"decode"}, {"tile", "mosaic"}, {"tile", "mosaic", "dense"}]
    assert kernels(1024, 80) == kernels(1024, 100) == {"tile", "dense"}
    assert {t.bm for t in tune.candidates(Case(90, "bfloat16", 128, 1, 4096, 4096))} == {8}


def test_the_matmuls_that_a_function_asks_for_are_timed_and_kept(clock):
    def fn(w, x, one):
        q, k = shared_int4_matmul(one, w["a"], w["c"])
        return int4_matmul(x, w["a"]), int4_matmul(x, w["a"]), int4_matmul(one, w["b"]), q, k

    weights = {"a": weight(), "b": weight(256, 128), "c": weight(256, 64)}
    with target(90), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        found = awq.tune(fn, weights, rows(50), rows(1))
        assert [(one.case.m, one.case.n) for one in found] == [(1, 384 + 64), (64, 384), (1, 128)]
        assert all(one.gain == 2 for one in found)
        assert taken() == taken(m=40) == taken(m=1, n=448) == FAST
        assert taken(m=65).kernel == "tile"
        table.remembered.cache_clear()
        assert taken() == FAST, "read again, as another process does"
        table.remember(CASE, RULE)
        assert taken() == RULE, "the newest counts"
    assert taken() == RULE, "not measured on this machine"


def test_other_kernels_of_the_case_are_still_found():
    with target(90):
        table.remember(CASE, FAST)
        assert table.triton_tiling(arch=90, m=64, **SHAPE) == RULE
        table.remember(CASE, Tiling("tile", 128, 128, 8, 4))
        assert table.grouped_tiling(90, "bfloat16", 128, 64, 384) == RULE


@pytest.mark.parametrize("implementation", [None, "triton"])
def test_a_program_traced_afterwards_takes_it(implementation):
    w, x = weight(), rows(64)

    def kernels(arch: int = 90) -> str:
        with target(arch):
            return str(jax.make_jaxpr(lambda x: int4_matmul(x, w, implementation=implementation))(x))

    assert "awq_mosaic" not in kernels()
    with target(90):
        table.remember(CASE, FAST)
    jax.clear_caches()
    assert ("awq_mosaic" in kernels()) == (implementation is None)
    assert "awq_mosaic" not in kernels(80), "each GPU has its own"


def test_each_gpu_has_its_own_kernel(monkeypatch):
    w, experts, asked = weight(), jax.tree.map(lambda a: a[None], weight()), []
    monkeypatch.setattr(
        triton, "launch", lambda kernel, *_, out, **__: (asked.append(kernel), jnp.zeros(out.shape, out.dtype))[1]
    )
    for arch, expected in ((90, {"decode", "ragged"}), (80, {"decode", "ragged"}), (75, {"gemv"})):
        asked.clear()
        with target(arch):
            jax.make_jaxpr(lambda x: int4_matmul(x, w))(rows(1))
            jax.make_jaxpr(lambda x: grouped_int4_matmul(x, experts, jnp.array([1])))(rows(1))
        assert set(asked) == expected


def test_a_limit_of_time(clock):
    with target(90):
        assert len(awq.tune(lambda w, *xs: [int4_matmul(x, w) for x in xs], weight(), rows(1), rows(64), limit=-1)) == 1


def test_nothing_is_kept_where_what_served_before_does_not_run(monkeypatch, file):
    monkeypatch.setattr(tune, "ROTATED", 1)
    only_dense = lambda x, w, tiling: refuse() if tiling.kernel != "dense" else x @ w.dequantize()
    monkeypatch.setattr(tune, "TABLED", dataclasses.replace(tune.TABLED, matmul=only_dense))

    def refuse():
        raise OSError("no driver")

    with target(90):
        (found,) = awq.tune(lambda w, x: int4_matmul(x, w), weight(), rows(512))
    assert {t.kernel for t in found.seconds} == {"dense"}
    assert set(found.failed.values()) == {"OSError: no driver"}
    assert found.best is None
    assert not file.exists()


def test_lines_of_something_else_are_told_and_left_out(file):
    with target(90):
        table.remember(CASE, FAST)
        good = file.read_text()
        for text in ("{", '{"arch": 90}\n', "[]\n", good[:40]):
            file.write_text(good + text)
            table.remembered.cache_clear()
            with pytest.warns(UserWarning, match=r"tilings.jsonl: 1 of its lines are no tilings"):
                assert taken() == FAST
            table.remember(CASE, RULE)
            with pytest.warns(UserWarning, match="1 of its lines"):
                assert taken() == RULE
            assert file.read_text().startswith(good + text)


@pytest.mark.parametrize(
    "change",
    [{"kernel": "gone"}, {"stages": 99}, {"with": {"device": "sm_90", "jax": "0.1"}}],
)
def test_rows_that_do_not_hold_any_more_are_not_taken(file, change):
    with target(90):
        table.remember(CASE, FAST)
        file.write_text(json.dumps(json.loads(file.read_text()) | change) + "\n")
        table.remembered.cache_clear()
        assert taken() == RULE


def test_without_a_home_there_is_nothing_remembered(monkeypatch):
    def no_home():
        raise InputError("There is no home folder.")

    monkeypatch.setattr(table, "users_file", no_home)
    assert taken() == RULE


def test_what_cannot_be_tuned(monkeypatch):
    fn = lambda w, x: int4_matmul(x, w)
    with pytest.raises(ValueError, match="NVIDIA GPU"):
        awq.tune(fn, weight(), rows(1))
    with target(90):
        with pytest.raises(ValueError, match="no matmul of the function"):
            awq.tune(fn, weight(), jax.ShapeDtypeStruct((1, 256), jnp.float32))
        with pytest.raises(ValueError, match=r"awq\.prepare"):
            awq.tune(lambda x: x, rows(1))
        monkeypatch.setattr(launch, "missing", lambda: "triton not installed")
        with pytest.raises(ValueError, match="triton not installed"):
            awq.tune(fn, weight(), rows(1))


def test_a_chain_multiplies_with_each_weight_in_each_round():
    multiplied = []
    multiply = lambda x, w: (multiplied.append(w), x @ w)[1]
    w = [jnp.eye(4) * i for i in range(3)]
    chain = tune.Chain.of(multiply, jnp.ones((2, 4)), w).compiled()
    assert len(multiplied) == 3
    assert chain.rounds == 64
    last = chain.run(chain.x, chain.weights)
    np.testing.assert_allclose(jnp.stack(last), [np.full((2, 4), i * (1 + 63 / 64)) for i in range(3)])
    assert chain.seconds(repeats=1) > 0


def test_the_command(monkeypatch, clock, file):
    @dataclass(frozen=True)
    class Model:
        params: Any

        def logits(self, tokens):
            return int4_matmul(jnp.ones((*tokens.shape, 256), jnp.bfloat16), self.params)

    shapes = jax.eval_shape(weight)
    monkeypatch.setattr("awq_jax.pipeline.load.opened", lambda path: (Model(shapes), pytest.fail))
    with target(90):
        done = run("tune", "folder", "--rows", "64", "1")
        assert done.code == 0
        assert done.rows["64"] == ["256 x 384", "mosaic 64 x 128", "1.0", "2.00"]
        assert str(file) in done.out.replace("\n", "")
        assert taken() == taken(m=1) == FAST


def test_the_command_without_a_gpu(monkeypatch):
    done = run("tune", "no folder")
    assert done.code == 2
    assert "compute capability 8.0 or newer: none is here" in done.err

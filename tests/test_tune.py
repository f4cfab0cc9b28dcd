"""Tuning: what is timed, what is kept, and that later programs take it."""

import importlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run

from awq_jax import prepare
from awq_jax import tune as tune_weights
from awq_jax.kernels import table, target
from awq_jax.kernels.table import Case, Tiling
from awq_jax.spec import QuantSpec
from awq_jax.tensor import quantize

tune = importlib.import_module("awq_jax.tune")
CASE = Case(90, "bfloat16", 128, 64, 256, 384)
FAST = Tiling("mosaic", 64, 128, 12, 6)
SLOW = table.tiling(90, "bfloat16", 128, 64, 256, 384)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A user without tilings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table.rows.cache_clear()
    yield tmp_path
    table.rows.cache_clear()


@pytest.fixture
def clock(monkeypatch):
    """One kernel is twice as fast as what the rule takes."""
    monkeypatch.setattr(tune, "ROTATED", 1)
    monkeypatch.setattr(tune, "seconds_of", lambda case, weights: {FAST: 1e-6, SLOW: 2e-6})


def params():
    weight = lambda k, n: quantize(np.ones((k, n), np.float32), QuantSpec(4, 128))
    return {"a": weight(256, 384), "b": weight(256, 384), "c": weight(384, 256), "dense": jnp.ones((2, 2))}


def taken(m: int = 64, n: int = 384) -> Tiling:
    return table.tiling(90, "bfloat16", 128, m, 256, n)


def test_what_is_timed():
    kernels = lambda m: {t.kernel for t in tune.candidates(Case(90, "bfloat16", 128, m, 4096, 4096))}
    assert [kernels(m) for m in (1, 64, 1024)] == [{"decode"}, {"tile", "mosaic"}, {"tile", "mosaic", "dense"}]
    assert {t.bm for t in tune.candidates(Case(90, "bfloat16", 128, 1, 4096, 4096))} == {8}
    assert "mosaic" not in {t.kernel for t in tune.candidates(Case(80, "bfloat16", 128, 1024, 4096, 4096))}


def test_the_fastest_serves_from_then_on(clock, cache):
    with target(90):
        found = tune_weights(params(), rows=(64, 1))
    assert [(one.case.m, one.case.k, one.case.n) for one in found] == [
        (64, 256, 384), (64, 384, 256), (1, 256, 384), (1, 384, 256),
    ]  # fmt: skip
    assert found[0].gain == 2
    assert taken() == taken(m=40) == FAST
    assert taken(m=65).kernel == "tile"
    table.rows.cache_clear()
    assert taken() == FAST, "read again, as another process does"
    table.remember(CASE, SLOW)
    assert taken() == SLOW, "the newest counts"


def test_other_kernels_of_the_case_are_still_found():
    table.remember(CASE, FAST)
    assert table.kernel_tiling(90, "bfloat16", 128, 64, 256, 384).kernel == "tile"
    assert table.grouped_tiling(90, "bfloat16", 128, 64, 256, 384).kernel == "tile"


def test_a_program_compiled_afterwards_takes_it(monkeypatch):
    from awq_jax.kernels import int4_matmul, mosaic, triton

    seen = []
    monkeypatch.setattr(
        mosaic, "matmul", lambda x, w, dtype, tiling: seen.append(tiling) or jnp.zeros((64, 384), x.dtype)
    )
    monkeypatch.setattr(triton, "launch", lambda *_, out, **__: jnp.zeros(out.shape, out.dtype))
    w = jax.eval_shape(lambda: prepare(params())["a"])
    x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
    with target(90):
        jax.eval_shape(lambda x, w: int4_matmul(x, w, implementation="triton"), x, w)
        assert seen == []
        table.remember(CASE, FAST)
        jax.eval_shape(lambda x, w: int4_matmul(x, w, implementation="triton"), x, w)
    assert seen == [FAST]


def test_a_limit_of_time(clock):
    with target(90):
        assert len(tune_weights(params(), limit=-1)) == 1


@pytest.mark.parametrize("text", ["{", '{"arch": 90}', '{"arch": 90, "kernel": "tile"', "[]"])
def test_a_file_of_something_else_is_told_and_left(cache, text):
    table.users_file().parent.mkdir()
    table.users_file().write_text(text)
    with pytest.warns(UserWarning, match=r"tilings.jsonl holds something else .* delete it"):
        assert taken() == SLOW
    assert table.users_file().read_text() == text


def test_a_kernel_that_is_no_more_is_not_taken():
    table.remember(CASE, Tiling("gone", 1, 1))
    assert taken() == SLOW


def test_what_cannot_be_tuned():
    with pytest.raises(ValueError, match="no 4-bit weights"):
        tune_weights({"w": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="NVIDIA GPU"):
        tune_weights(params())


def test_the_command(monkeypatch, clock, cache):
    monkeypatch.setattr(importlib.import_module("awq_jax.load"), "load", lambda path: SimpleNamespace(params=params()))
    with target(90):
        done = run("tune", "folder")
    assert done.code == 0
    assert done.rows["64"] == ["384 x 256", "mosaic 64 x 128", "1.0", "2.00"]
    assert str(table.users_file()) in done.out.replace("\n", "")
    assert taken() == FAST


def test_the_command_without_a_gpu(monkeypatch):
    monkeypatch.setattr(importlib.import_module("awq_jax.load"), "load", lambda path: SimpleNamespace(params=params()))
    done = run("tune", "folder")
    assert done.code == 2
    assert "compute capability 8.0 or newer: none is here" in done.err

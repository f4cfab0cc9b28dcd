"""What benchmarks/peers.py and gpu_tune.py make of weights and times, on any machine."""

import importlib
import json
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import pytest
from loose import loose

from awq_jax.kernels import target
from awq_jax.kernels.tilings.table import Case, Tiling
from awq_jax.transforms.tune import Tuned
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import in_tiles, round_to_nearest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_tuning_keeps_one_row_a_case(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    script, record = importlib.import_module("gpu_tune"), importlib.import_module("gpu_record").Record("tune", tmp_path)
    before = json.loads(script.TABLE.read_text())
    monkeypatch.setattr(script, "TABLE", tmp_path / "table.json")
    script.TABLE.write_text(json.dumps(before | {"measured": []}))
    case = Case(90, "bfloat16", 128, 64, 4096, 4096)
    slow, fast = Tiling("tile", 64, 128, 4, 4), Tiling("mosaic", 64, 128, 12, 6)
    times = iter([{slow: 2.0}, {fast: 1.0, slow: 2.0}])
    monkeypatch.setattr(script, "LLAMA_8B", ((4096, 4096),))
    monkeypatch.setattr(script, "ROWS", (64,))
    monkeypatch.setattr(script, "distinct", lambda k, n, make: [])
    monkeypatch.setattr(script, "timings", lambda case, before, weights: Tuned(case, slow, next(times), {}))
    with target(90):
        for _ in range(2):
            script.run(record)
    assert json.loads(script.TABLE.read_text()) == before | {"measured": [asdict(case) | asdict(fast)]}
    assert [row.found for row in record.rows] == [1.0, 2.0]


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("peers")


def test_a_peer_that_multiplies_wrong_or_fails_is_left_out_with_its_reason(peers):
    def one(factor):
        multiply = loose(lambda x, w: factor * (x @ w))
        return lambda: peers.Peer(lambda w: w.dequantize(), multiply, in_torch=False)

    def broken():
        raise OSError("no library")

    found, left_out = peers.usable({"right": one(1), "wrong": one(2), "broken": broken})
    assert set(found) == {"right"}
    assert "off by" in left_out["wrong"]
    assert left_out["broken"] == "OSError: no library"


def test_parts_are_what_the_weight_is_made_of(peers):
    w = in_tiles(round_to_nearest(np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32), QuantSpec(4, 128)))
    q, s, z = peers.parts(w)
    spread = lambda a: np.repeat(a, 128, axis=0)
    np.testing.assert_array_equal((q - spread(z)) * spread(s), w.dequantize())


def test_copies_of_a_converted_weight_are_arrays_of_their_own(peers):
    first, *others = found = peers.copies({"q": np.arange(6), "s": jax.numpy.ones(3)}, 3)
    assert len(found) == 3
    for other in others:
        np.testing.assert_array_equal(other["q"], first["q"])
        assert not np.shares_memory(other["q"], first["q"])
        assert other["s"].unsafe_buffer_pointer() != first["s"].unsafe_buffer_pointer()

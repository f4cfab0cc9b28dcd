"""benchmarks/kernels.py runs on any machine with --small, and says what a reader needs."""

import importlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from awq_jax.kernels import target
from awq_jax.kernels.table import Case, Tiling
from awq_jax.spec import QuantSpec
from awq_jax.tensor import in_tiles, quantize
from awq_jax.tune import Tuned

SCRIPT = Path(__file__).parents[1] / "benchmarks/kernels.py"


def test_small(tmp_path):
    out = tmp_path / "kernels.json"
    subprocess.run([sys.executable, SCRIPT, "--small", "--out", out], check=True, capture_output=True)
    result = json.loads(out.read_text())
    assert {row["name"] for row in result["rows"]} == {"xla bf16", "xla dequantize"}
    assert all(row["over_bf16"] == 1 for row in result["rows"] if row["name"] == "xla bf16")
    assert set(result["left_out"]) == {"torch int4pack", "gemlite", "humming", "tokamax"}
    assert all("Error" in why for why in result["left_out"].values())
    assert all(row["us"] > 0 for row in result["rows"])
    assert min(result["ceilings"].values()) > 0
    plot = [sys.executable, SCRIPT.with_name("kernels_plot.py"), "--from", out, "--to", tmp_path / "kernels.svg"]
    subprocess.run(plot, check=True, capture_output=True)
    drawn = (tmp_path / "kernels.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("256 x 256", "xla dequantize"))


def test_tuning_keeps_one_row_a_case(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = importlib.import_module("kernels")
    before = json.loads(script.TABLE.read_text())
    monkeypatch.setattr(script, "TABLE", tmp_path / "table.json")
    script.TABLE.write_text(json.dumps(before | {"measured": []}))
    case = Case(90, "bfloat16", 128, 64, 4096, 4096)
    slow, fast = Tiling("tile", 64, 128, 4, 4), Tiling("mosaic", 64, 128, 12, 6)
    times = iter([{slow: 2.0}, {fast: 1.0, slow: 2.0}])
    monkeypatch.setattr(script, "LLAMA_8B", ((4096, 4096),))
    monkeypatch.setattr(script, "TUNED_ROWS", (64,))
    monkeypatch.setattr(script, "weights_of", lambda k, n, small: ([], []))
    monkeypatch.setattr(script, "timings", lambda case, before, weights: Tuned(case, slow, next(times), {}))
    with target(90):
        for _ in range(2):
            script.tune(60)
    assert json.loads(script.TABLE.read_text()) == before | {"measured": [asdict(case) | asdict(fast)]}


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("peers")


def test_a_peer_that_multiplies_wrong_or_fails_is_left_out_with_its_reason(peers):
    def one(factor):
        return lambda: peers.Peer(lambda w: w.dequantize(), lambda x, w: factor * (x @ w), in_torch=False)

    def broken():
        raise OSError("no library")

    found, left_out = peers.usable({"right": one(1), "wrong": one(2), "broken": broken})
    assert set(found) == {"right"}
    assert "off by" in left_out["wrong"]
    assert left_out["broken"] == "OSError: no library"


def test_parts_are_what_the_weight_is_made_of(peers):
    w = in_tiles(quantize(np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32), QuantSpec(4, 128)))
    q, s, z = peers.parts(w)
    spread = lambda a: np.repeat(a, 128, axis=0)
    np.testing.assert_array_equal((q - spread(z)) * spread(s), w.dequantize())

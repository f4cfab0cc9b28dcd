"""benchmarks/kernels.py runs on any machine with --small, and says what a reader needs."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from awq_jax.kernels import table, target
from awq_jax.spec import QuantSpec
from awq_jax.tensor import in_tiles, quantize

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


@pytest.fixture
def script(monkeypatch, tmp_path):
    """benchmarks/kernels.py as a module that writes another table, of two tiny shapes and a clock that knows."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    found = importlib.import_module("kernels")
    empty = json.loads(found.TABLE.read_text()) | {"measured": []}
    monkeypatch.setattr(found, "TABLE", tmp_path / "table.json")
    found.TABLE.write_text(json.dumps(empty))
    monkeypatch.setattr(found, "SHAPES", ((256, 256), (256, 512)))
    monkeypatch.setattr(found, "weights_of", lambda k, n, small: ([], []))
    monkeypatch.setattr(found, "seconds", lambda multiply, *_, **__: multiply.keywords["tiling"].stages + 1.0)
    yield found
    table.rows.cache_clear()


def test_tuning_times_what_may_serve_and_keeps_one_row_a_case(script):
    before = json.loads(script.TABLE.read_text())
    with target(90):
        kernels = {m: {t.kernel for t in script.candidates(m)} for m in (1, 64, 1024)}
        assert kernels == {1: {"decode"}, 64: {"tile", "mosaic"}, 1024: {"tile", "mosaic", "dense"}}
        for _ in range(2):
            script.tune(1e6)
    after = json.loads(script.TABLE.read_text())
    assert {key: after[key] for key in ("comment", "untimed", "rule")} == {
        key: before[key] for key in ("comment", "untimed", "rule")
    }
    assert len(after["measured"]) == 11 * 2
    best = {(row["m"], row["n"]): row["kernel"] for row in after["measured"]}
    assert best[1024, 512] == "dense"
    assert best[64, 256] == "tile"


def test_tuning_stops_in_time(script):
    with target(90):
        script.tune(-1)
    assert json.loads(script.TABLE.read_text())["measured"] == []


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

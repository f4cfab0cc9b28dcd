"""Every step of benchmarks/gpu_steps.py at toy size: on a GPU only the GPU is new."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="triton has wheels for Linux only")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """Modules of the benchmarks by name, on a machine that seems to have one device."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    return importlib.import_module


def toy(benchmarks, step: str, folder: Path, seconds: float = 600.0) -> tuple[dict, dict]:
    """What a step found: its rows by name, and all of its part of the file."""
    benchmarks("gpu_steps").run_here(step, seconds, folder, toy=True)
    part = json.loads((folder / "toy.json").read_text())[step]
    return {(row["what"], row["unit"]): row for row in part["rows"]}, part


def troubles(rows: dict) -> dict[str, str]:
    return {what: row["why"] for (what, _), row in rows.items() if row["why"]}


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_smoke(benchmarks, tmp_path, capsys):
    rows, _ = toy(benchmarks, "smoke", tmp_path)
    (mosaic,) = troubles(rows).items()
    assert mosaic[0].startswith("mosaic")
    assert "interpret" in mosaic[1]
    assert {what.split("-")[0] for what, unit in rows if unit == "of the bound"} == {"triton"}
    assert all(row["verdict"] == "met" for row in rows.values() if row["goal"] is not None)
    assert min(json.loads((tmp_path / "toy.json").read_text())["ceilings"].values()) > 0
    assert "smoke: toy" in capsys.readouterr().out


def test_check_tells_a_sanitizer_that_finds_something(benchmarks, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    program(tmp_path, "compute-sanitizer", 'echo "ERROR SUMMARY: 1 error of $2"; [ $2 = memcheck ] || exit 9')
    rows, part = toy(benchmarks, "check", tmp_path)
    assert rows["cases within their bound", ""]["found"] == "6 of 7"
    ways = {detail["case"].split("-")[0] for detail in part["details"]}
    assert ways == {"triton", "xla", "direct", "shared", "scanned", "ragged"}
    assert rows["compute-sanitizer memcheck, 0 cases", ""]["found"] == "ERROR SUMMARY: 1 error of memcheck"
    assert "exit code 9: ERROR SUMMARY" in troubles(rows)["compute-sanitizer racecheck"]


def test_kernels(benchmarks, tmp_path):
    rows, part = toy(benchmarks, "kernels", tmp_path)
    told = troubles(rows)
    assert set(told) == {f"peer {name}" for name in ("torch int4pack", "gemlite", "humming", "tokamax")} | {
        "128 x 32, 64 rows, mosaic"
    }
    assert {(d["m"], d["name"]) for d in part["details"]} == {
        (m, name) for m in (1, 64) for name in ("xla bf16", "xla dequantize", "int4_matmul", "triton")
    }
    assert all(d["us"] > 0 and d["floor_us"] > 0 and d["noise"] >= 0 for d in part["details"])
    goals = {key: row["goal"] for key, row in rows.items() if row["goal"] is not None}
    assert goals == {("128 x 32, 1 rows", "of the bandwidth"): 0.85, ("128 x 32, 1 rows", "x bf16"): 3.3}
    benchmarks("kernels_plot").draw("toy", part["details"], tmp_path / "toy.svg")
    drawn = (tmp_path / "toy.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("128 x 32", "xla dequantize", "the machine's ceilings"))


@pytest.mark.parametrize(
    ("m", "times", "wanted"),
    [
        (16, {"xla bf16": 4.0, "int4_matmul": 1.0}, {"of the bandwidth": 0.85, "x bf16": 3.3}),
        (64, {"xla bf16": 2.0, "int4_matmul": 1.0, "humming": 3.0, "gemlite": 2.0}, {"x gemlite, the fastest peer": 1}),
        (256, {"xla bf16": 2.0, "int4_matmul": 1.0, "triton": 2.0, "mosaic": 1.0, "humming": 2.0}, {}),
        (512, {"xla bf16": 1.0, "int4_matmul": 1.0}, {"x bf16": 0.95}),
    ],
)
def test_goals_by_number_of_rows(benchmarks, m, times, wanted):
    found = {row.unit: row for row in benchmarks("gpu_kernels").goals(m, times, floor=0.5, read=0.5, bandwidth=1.0)}
    assert {unit: row.goal for unit, row in found.items() if row.goal is not None} == wanted
    assert found["x bf16"].found == times["xla bf16"]
    assert found["of the roofline"].found == 0.5
    assert ("x triton: the kernel for Hopper" in found) == (m == 256)


def test_tune_leaves_the_table_alone(benchmarks, tmp_path):
    table = benchmarks("gpu_tune").TABLE
    before = table.read_text()
    rows, part = toy(benchmarks, "tune", tmp_path)
    assert not troubles(rows)
    assert len(part["details"][0]["us"]) > 1
    assert table.read_text() == before


def test_decode(benchmarks, tmp_path):
    rows, part = toy(benchmarks, "decode", tmp_path)
    assert set(troubles(rows)) == {"decode loop", "scan over layers"}
    assert all("listing" in why for why in troubles(rows).values())
    assert rows["batch 1: quantized", "x bf16"]["goal"] == 3
    assert rows["batch 1, quantized", "of the roofline"]["goal"] == 0.75
    assert rows["prefill of 32 tokens: quantized", "x bf16"]["goal"] == 0.95
    assert part["details"][0]["floors"]["dense"] > 1.5 * part["details"][0]["floors"]["quantized"]


def test_quantize(benchmarks, tmp_path):
    rows, part = toy(benchmarks, "quantize", tmp_path)
    assert not troubles(rows)
    assert [d["part"] for d in part["details"]] == ["layers_0", "layers_1"]
    assert rows["search: codes equal on GPU and CPU", "of all"]["found"] == 1
    assert rows["rounded: codes that differ and are no ties", ""]["found"] == 0
    assert rows["in memory: calibrate and quantize", "s"]["goal"] == 60
    assert 0 < rows["1 passes of distillation: KL", "nats a token"]["found"] < 1


NCU = """cat <<'END'
==PROF== Connected
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","awq_decode","dram__bytes_read.sum","Mbyte","99"
"1","awq_decode","dram__bytes_read.sum","Mbyte","40.25"
"1","awq_decode","dram__bytes_write.sum","Kbyte","1,000"
"1","awq_decode","gpu__time_duration.sum","usecond","10"
"1","awq_decode","sm__inst_executed_pipe_tensor.sum","","n/a"
END"""


def test_profile_reads_what_ncu_counts_of_the_last_launch(benchmarks, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    program(tmp_path, "ncu", NCU)
    rows, part = toy(benchmarks, "profile", tmp_path)
    assert part["details"][0]["counted"] == {
        "dram__bytes_read.sum": 40.25e6,
        "dram__bytes_write.sum": 1e6,
        "gpu__time_duration.sum": 10_000,
    }
    least = 4096 * 14336 * (0.5 + 3 / 128) + 2 * (4096 + 14336)
    moved = rows["triton, 1 x 4096 x 14336: bytes moved", "x the least"]["found"]
    assert moved == pytest.approx(41.25e6 / least)
    program(tmp_path, "ncu", "echo no permission; exit 1")
    rows, _ = toy(benchmarks, "profile", tmp_path)
    assert "no kernel: no permission" in troubles(rows)["1 4096 14336 triton"]


def test_a_step_whose_time_is_over_says_so_beside_what_was_found_before(tmp_path):
    program(tmp_path, "ncu", "exit 1")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "toy.json").write_text('{"smoke": "before"}')
    command = [sys.executable, BENCHMARKS / "gpu_steps.py", "profile:0", "--toy", "--results", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "== profile: done" in done.stdout
    found = json.loads((tmp_path / "toy.json").read_text())
    assert found["smoke"] == "before"
    assert [row["why"] for row in found["profile"]["rows"]] == ["not reached: the step's time was over"]


def test_a_step_that_dies_or_hangs_costs_itself_alone(benchmarks, tmp_path, monkeypatch):
    steps = benchmarks("gpu_steps")
    monkeypatch.setattr(steps, "GRACE", 0)
    program(tmp_path, "python", 'case "$2" in smoke*) exit 3;; tune*) sleep 9;; esac')
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    failed = steps.run_all([("smoke", 9.0), ("tune", 0.2), ("check", 9.0)], tmp_path, toy=True)
    assert failed == ["smoke: exit code 3", "tune: killed after 0 s"]
    monkeypatch.setattr(sys, "argv", ["gpu_steps.py", "smokes"])
    with pytest.raises(SystemExit):
        steps.main()


def test_scripts_parse():
    for script in ("gpu_all.sh", "gpu_wheels.sh"):
        subprocess.run(["bash", "-n", BENCHMARKS / script], check=True)

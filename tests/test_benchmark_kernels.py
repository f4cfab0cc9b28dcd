"""benchmarks/kernels.py runs on any machine with --small, and says what a reader needs."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks/kernels.py"


def test_small(tmp_path):
    out = tmp_path / "kernels.json"
    subprocess.run([sys.executable, SCRIPT, "--small", "--out", out], check=True, capture_output=True)
    result = json.loads(out.read_text())
    assert {row["name"] for row in result["rows"]} == {"xla bf16", "xla dequantize"}
    assert all(row["us"] > 0 for row in result["rows"])
    assert min(result["ceilings"].values()) > 0

"""benchmarks/decode.py compares the models it is given, or rounds the dense one itself."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import tiny_folder

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks/decode.py"


@pytest.mark.parametrize("file", ["", "config.json"])
def test_two_models_take_turns(file, tmp_path):
    model, out = tiny_folder(tmp_path / "model") / file, tmp_path / "decode"
    sizes = ["--prompt", "4", "--tokens", "9", "--runs", "1", "--name", out]
    subprocess.run([sys.executable, SCRIPT, model, *sizes], check=True, capture_output=True)
    result = json.loads(out.with_suffix(".json").read_text())["result"]
    assert result["dtype"] == ("bfloat16" if file else "float32")
    assert set(result["models"]) == {"dense", "quantized"}
    assert all(of["first_token_s"] > 0 for of in result["models"].values())
    assert math.isfinite(result["quantized_over_dense"])

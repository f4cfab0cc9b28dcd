"""Everything that needs a GPU, in steps that each have a process and a share of time of their own.

  python benchmarks/gpu_steps.py [STEP[:SECONDS] ...] [--toy] [--results FOLDER]

No step named means all but profile. A step that fails or is killed leaves what it had found, and the next one runs.
--toy runs tiny sizes on any machine. README.md beside this says what each should show.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

HERE = Path(__file__).parent
STEPS = {
    "smoke": ("gpu_smoke", 110),
    "check": ("gpu_checks", 190),
    "kernels": ("gpu_kernels", 200),
    "tune": ("gpu_tune", 90),
    "decode": ("gpu_decode", 200),
    "quantize": ("gpu_quantize", 240),
    "profile": ("gpu_profile", 60),
}
"""The module of each step, and after how many seconds it begins nothing new."""
MEMORY = {"decode": ".9", "quantize": ".9"}
"""What jax takes of the device at once; in other steps it leaves room for other processes and other projects."""
GRACE = 40
"""Seconds after its share when a step is killed."""


def run_here(step: str, seconds: float, folder: Path, toy: bool) -> None:
    from gpu_record import Record, toy_gpu

    record = Record(step, folder, time.monotonic() + seconds, toy)
    with toy_gpu() if toy else nullcontext():
        importlib.import_module(STEPS[step][0]).run(record)
    record.table()


def run_all(steps: list[tuple[str, float]], folder: Path, toy: bool) -> list[str]:
    """Runs each step in a process of its own; a line for each that failed."""
    failed = []
    for step, seconds in steps:
        print(f"== {step}, {seconds:.0f} s", flush=True)
        start = time.monotonic()
        command = [sys.executable, __file__, f"{step}:{seconds}", "--here", "--results", str(folder)]
        own = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY.get(step, ".6")}
        try:
            code = subprocess.run(command + ["--toy"] * toy, timeout=seconds + GRACE, env=own, check=False).returncode
            trouble = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            trouble = f"killed after {seconds + GRACE:.0f} s"
        print(f"== {step}: {trouble or 'done'}, {time.monotonic() - start:.0f} s", flush=True)
        failed += [f"{step}: {trouble}"] if trouble else []
    return failed


def step(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition(":")
    if name not in STEPS:
        raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(STEPS)}")
    return name, float(seconds or STEPS[name][1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", type=step, metavar="STEP[:SECONDS]", help=", ".join(STEPS))
    parser.add_argument("--toy", action="store_true", help="tiny sizes, any machine")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of what is found")
    parser.add_argument("--here", action="store_true", help="in this process")
    options = parser.parse_args()
    steps = options.steps or [step(name) for name in STEPS if name != "profile"]
    if options.here:
        for name, seconds in steps:
            run_here(name, seconds, options.results, options.toy)
    elif failed := run_all(steps, options.results, options.toy):
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()

"""What a kill leaves: `awq-jax quantize --overwrite` of a tiny model, killed at random moments.

  python benchmarks/kills.py [--count 100] [--seed 0]

The destination must be one of the two outputs that take turns, whole; after SIGTERM, SIGINT and SIGHUP the exit code
is that of the signal, one line is said and nothing else is left; what SIGKILL leaves the next run removes. A quarter of
the kills waits for the last step, in which old and new change places.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from awq_jax.formats.scratch import PREFIX
from awq_jax.formats.manifest import MANIFEST

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)
QUICK = ("--group-size", "32", "--preset", "rtn", "--samples", "1", "--seq-len", "32", "--skip", "mlp", "attn/[qkv]")
VARIANTS = {"asymmetric": [], "symmetric": ["--symmetric"]}


def start(model: Path, out: Path, variant: str, *more: str) -> subprocess.Popen:
    program = "from awq_jax_command import main; main()"
    command = [
        sys.executable,
        "-c",
        program,
        "quantize",
        str(model),
        str(out),
        *QUICK,
        "--overwrite",
        *VARIANTS[variant],
        *more,
    ]
    # A shell's background jobs ignore SIGINT, and so do their children.
    listen = lambda: [signal.signal(number, signal.SIG_DFL) for number in SIGNALS[:3]]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen)


def content(folder: Path) -> str:
    """A digest of all files and their names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = [f"{file.relative_to(folder)} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def wait_for_the_end(process: subprocess.Popen, home: Path) -> None:
    """Until all is written but not yet in its place."""
    while process.poll() is None and not list(home.glob(f"{PREFIX}*/new/**/{MANIFEST}")):
        time.sleep(0.0005)


def kills(root: Path, count: int, seed: int, more: tuple[str, ...] = ()) -> dict[str, int]:
    """How often what happened; raises where something is lost, half or left."""
    from checkpoints import tiny_folder

    model, out, draw = tiny_folder(root / "dense", num_hidden_layers=1), root / "out", random.Random(seed)
    known, seconds = {}, 0.0
    for variant in VARIANTS:
        began = time.monotonic()
        process = start(model, out, variant, *more)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        known[content(out)], seconds = variant, time.monotonic() - began
    assert len(known) == 2
    found: Counter[str] = Counter()
    stale: set[str] = set()
    for k in range(count):
        number = SIGNALS[k % 4]
        before = known[content(out)]
        process = start(model, out, next(v for v in VARIANTS if v != before), *more)
        if k // 4 % 4 == 3:
            wait_for_the_end(process, root)
            time.sleep(draw.uniform(0, 0.03))
        else:
            time.sleep(draw.uniform(0.15, seconds))
        process.send_signal(number)
        _, errors = process.communicate()
        after, left = known.get(content(out)), {path.name for path in root.glob(".*")}
        where = f"kill {k} by {number.name}: exit {process.returncode}, {errors!r}, {before} to {after}, left {left}"
        print(where, file=sys.stderr, flush=True)
        assert after is not None, where
        if number is signal.SIGKILL:
            found["SIGKILL left a scratch folder, which a later run removed"] += bool(left - stale)
            stale = left
        else:
            ended = (process.returncode, errors) == (128 + number, "awq-jax: stopped.\n")
            assert ended or ((process.returncode, errors) == (0, "") and after != before), where
            # A run that was killed before it began to write has not looked yet for what the one before left.
            assert left <= stale, where
        finished = "had finished" if process.returncode == 0 else "killed"
        found[f"{number.name}, {finished}: {'old' if after == before else 'new'}, whole"] += 1
    process = start(model, out, "symmetric", *more)
    process.communicate()
    assert sorted(path.name for path in root.iterdir()) == ["dense", "out"]
    return dict(sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", default="awq")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    found = kills(root, args.count, args.seed, ("--format", args.format))
    shutil.rmtree(root)
    print(json.dumps({"kills": args.count, **found}, indent=1))


if __name__ == "__main__":
    main()

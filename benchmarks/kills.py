"""What a kill leaves: `awq-jax quantize --overwrite` of a tiny model, killed at random moments.

  python benchmarks/kills.py [--count 100] [--seed 0] [--terminal]
  unshare --user --map-root-user --mount python benchmarks/kills.py --mounted

The destination must be one of the two outputs that take turns, whole; after SIGTERM, SIGINT and SIGHUP the exit code
is that of the signal, one line is said and nothing else is left; what SIGKILL leaves the next run removes. A quarter of
the kills waits for the last step, in which old and new change places.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from awq_jax.formats.manifest import MANIFEST
from awq_jax.formats.scratch import PREFIX

sys.path.insert(0, str(Path(__file__).parent.parent / "tests/helpers"))

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)
QUICK = ("--group-size", "32", "--preset", "rtn", "--samples", "1", "--seq-len", "32", "--skip", "mlp", "attn/[qkv]")
LISTENS = "import signal\nfor number in (1, 2, 15): signal.signal(number, signal.SIG_DFL)\n"
"""A shell's background jobs ignore SIGINT, and so do their children."""
COMMAND = "from awq_jax_command import main; main()"
LONGEST = 600
"""Seconds that a run may take on a busy machine."""
STOPPED = re.compile(r"awq-jax: stopped(?:; .* is (complete|as it was))?\.\n\Z")
"""The last line of a run that was stopped, and what it says of its destination."""
VARIANTS = {"asymmetric": [], "symmetric": ["--symmetric"]}


@dataclass
class Run:
    """A command under way, and whether its terminal is gone."""

    process: subprocess.Popen
    gone: threading.Event = field(default_factory=threading.Event)

    def show(self, screen: int) -> None:
        """Reads what the terminal shows until it goes away."""
        with suppress(OSError):
            while not self.gone.is_set():
                if select.select([screen], [], [], 0.02)[0]:
                    os.read(screen, 1 << 16)
        os.close(screen)

    def end(self) -> str | None:
        """What it says on the error stream; None where that was a terminal."""
        errors = self.process.communicate(timeout=LONGEST)[1]
        self.gone.set()
        return errors


def start(program: str, model: Path, out: Path, variant: str, *more: str, terminal: bool = False) -> Run:
    options = [*QUICK, "--overwrite", *VARIANTS[variant], *more]
    screen, theirs = os.openpty() if terminal else (None, subprocess.PIPE)
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENS + program, "quantize", str(model), str(out), *options],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        text=True,
    )
    run = Run(process)
    if screen is not None:
        os.close(theirs)
        threading.Thread(target=run.show, args=(screen,), daemon=True).start()
    return run


def content(folder: Path) -> str:
    """A digest of all files and their names, save those of scratch folders."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and PREFIX not in str(path))
    parts = [f"{file.relative_to(folder)} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def wait_for_the_start(process: subprocess.Popen) -> None:
    """Until the command listens for signals, which is the first that it does; before that Python is yet to start."""
    listens = lambda status: int(re.findall(r"SigCgt:\s*(\w+)", status)[0], 16) >> signal.SIGTERM - 1 & 1
    while process.poll() is None and not listens(Path(f"/proc/{process.pid}/status").read_text()):
        time.sleep(0.001)


def wait_for_the_end(process: subprocess.Popen, home: Path, out: Path, stale: set[str]) -> None:
    """Until all is written but not yet in its place; what earlier runs left counts not."""
    listed = Path("new", out.relative_to(home), MANIFEST)
    written = lambda: {file.relative_to(home).parts[0] for file in home.glob(f"{PREFIX}*/{listed}")}
    while process.poll() is None and not written() - stale:
        time.sleep(0.0005)


def put_back(home: Path) -> None:
    """What the next run does first."""
    program = "import sys; from awq_jax.formats.written import remove_stale, Path; remove_stale(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, str(home)], check=True)


def kills(
    root: Path,
    count: int,
    seed: int,
    more: tuple[str, ...] = (),
    *,
    mounted: bool = False,
    terminal: bool = False,
    program: str = COMMAND,
) -> dict[str, int]:
    """How often what happened; raises where something is lost, half or left.

    Args:
      mounted: the destination is a mount point, filled in place; what SIGKILL leaves there may be for the next run.
      terminal: the command runs in a terminal, which goes away before half of the signals.
      program: what runs.
    """
    from checkpoints import tiny_folder

    model, out, draw = tiny_folder(root / "dense", num_hidden_layers=1), root / "out", random.Random(seed)
    if mounted:
        out.mkdir()
        subprocess.run(["mount", "--bind", out, out], check=True)
    home = out if mounted else root
    known, seconds = {}, 0.0
    for variant in VARIANTS:
        began = time.monotonic()
        run = start(program, model, out, variant, *more)
        errors = run.end()
        assert run.process.returncode == 0, errors
        known[content(out)], seconds = variant, time.monotonic() - began
    assert len(known) == 2
    found: Counter[str] = Counter()
    stale: set[str] = set()
    for k in range(count):
        number, began = SIGNALS[k % 4], time.monotonic()
        before = known[content(out)]
        run = start(program, model, out, next(v for v in VARIANTS if v != before), *more, terminal=terminal)
        wait_for_the_start(run.process)
        if k // 4 % 4 == 3:
            wait_for_the_end(run.process, home, out, stale)
            time.sleep(draw.uniform(0, 0.03))
        else:
            time.sleep(draw.uniform(0, seconds))
        if terminal and k // 4 % 2:
            run.gone.set()
            time.sleep(0.05)
        run.process.send_signal(number)
        errors, code = run.end(), run.process.returncode
        left = {path.name for path in home.glob(f"{PREFIX}*")}
        if mounted and number is signal.SIGKILL and content(out) not in known:
            found["SIGKILL left files for the next run to put back"] += 1
            put_back(home)
        after = known.get(content(out))
        where = f"kill {k} by {number.name}: exit {code}, {errors!r}, {before} to {after}, left {left}"
        print(where, file=sys.stderr, flush=True)
        assert after is not None, where
        if number is signal.SIGKILL:
            found["SIGKILL left a scratch folder, which a later run removed"] += bool(left - stale)
            stale = left
        else:
            # A slow run tells how far it is, a line now and then.
            told = STOPPED.search(errors or "")
            ended = code == 128 + number and (errors is None or told is not None)
            assert ended or (code == 0 and after != before), where
            assert not (told and told[1]) or (told[1] == "complete") == (after != before), where
            assert "Traceback" not in (errors or ""), where
            # A run that was killed before it began to write has not looked yet for what the one before left.
            assert left <= stale, where
        finished = "had finished" if code == 0 else "killed"
        if code == 0:
            # The machine may be less busy by now.
            seconds = min(seconds, time.monotonic() - began)
        found[f"{number.name}, {finished}: {'old' if after == before else 'new'}, whole"] += 1
    put_back(home)
    assert sorted(path.name for path in root.iterdir()) == ["dense", "out"]
    assert content(out) in known
    assert not list(home.glob(f"{PREFIX}*"))
    if mounted:
        subprocess.run(["umount", out], check=True)
    return dict(sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", default="awq")
    parser.add_argument("--mounted", action="store_true", help="a mount point as the destination")
    parser.add_argument("--terminal", action="store_true", help="in a terminal, which may go away")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    more = ("--format", args.format)
    found = kills(root, args.count, args.seed, more, mounted=args.mounted, terminal=args.terminal)
    shutil.rmtree(root)
    print(json.dumps({"kills": args.count, **found}, indent=1))


if __name__ == "__main__":
    main()

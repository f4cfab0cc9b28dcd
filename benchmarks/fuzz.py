"""Reads damaged files in a process with limits on time and memory, and counts how that ends.

    python benchmarks/fuzz.py folder 1000 0       # reader, cases, seed
    python benchmarks/fuzz.py folder 1 417        # the case of seed 417 again, with what it raised

Every case damages one file of a small model (or a calibration text, or a report) and reads it as the commands do, up to
params, tokens and text. It should be read, or refused with the error of one line that commands end with: anything else
is counted by its seed. A case may take 10 seconds, and memory 4 times what the files have and SLACK.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from fuzz_readers import READERS

SECONDS, STARTUP = 10, 300
SLACK = 64 << 20
"""Bytes beyond 4 times the files: parsers and numpy work in steps of some size."""
LIMIT = 4 << 30
"""Bytes that the process may map beyond what it has: a case that wants more must not take the machine along."""


def serve(reader: str) -> None:
    """The child: reads seeds from its input, damages and reads, writes a line of JSON for each."""
    from mutate import damage

    from awq_jax.ending import silence_libraries

    silence_libraries()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def printed() -> str:
        """What a command would have printed beside its line: a traceback, or a panic of a library in Rust."""
        end = os.lseek(2, 0, os.SEEK_CUR)
        said = os.pread(2, end, 0).decode("utf-8", "replace")
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)
        return said[-3000:] if "Traceback" in said or "panicked" in said else ""

    make, read = READERS[reader]
    with tempfile.TemporaryDirectory() as scratch:
        whole = make(Path(scratch))
        files = [whole] if whole.is_file() else sorted(p for p in whole.rglob("*") if p.is_file())
        if reader == "template":
            files = [file for file in files if file.name.startswith(("chat", "tokenizer_config"))]
        read(whole, files[0])
        soft = memory("VmSize") + LIMIT
        resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
        print(json.dumps({"ready": True}), file=out, flush=True)
        for line in sys.stdin:
            rng = np.random.default_rng(int(line))
            copy = Path(scratch, "copy")
            shutil.rmtree(copy, ignore_errors=True)
            copy.mkdir()
            place = copy / whole.name
            shutil.copytree(whole, place) if whole.is_dir() else shutil.copy(whole, place)
            changed = place / files[rng.integers(len(files))].relative_to(whole)
            told = {
                "what": damage(changed, rng),
                "size": sum(f.stat().st_size for f in place.rglob("*") if f.is_file()),
            }
            before = forget_peak()
            told |= outcome(read, place, changed)
            if said := printed():
                told |= {"end": "printed", "says": said}
            told["memory"] = memory("VmHWM") - before
            print(json.dumps(told), file=out, flush=True)


def outcome(read: Callable[[Path, Path], None], path: Path, changed: Path) -> dict[str, str]:
    from awq_jax.formats.errors import InputError

    try:
        read(path, changed)
    except InputError as e:
        return {"end": "refused", "says": str(e)[:500]}
    except OSError as e:
        return {"end": "refused" if e.errno else "OSError", "says": str(e)}
    except BaseException as e:
        import traceback

        return {"end": type(e).__name__, "says": traceback.format_exc()[-3000:]}
    return {"end": "read", "says": ""}


def memory(field: str) -> int:
    """Bytes that this process has, by its name in /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> int:
    """Bytes in memory now, from where VmHWM counts anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmHWM")


class Child:
    """The process that reads, started anew when it ends."""

    def __init__(self, reader: str) -> None:
        self.command = [sys.executable, __file__, "--serve", reader]
        self.process: Any = None

    def ask(self, seed: int) -> dict[str, Any]:
        """How the case of a seed ends."""
        if self.process is None:
            self.errors = tempfile.TemporaryFile()  # noqa: SIM115
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
            self.process = subprocess.Popen(self.command, **pipes, env=os.environ | {"JAX_PLATFORMS": "cpu"})
            if "ready" not in self.line(STARTUP):
                raise SystemExit(f"the reader does not start:\n{self.said()}")
        self.process.stdin.write(f"{seed}\n".encode())
        self.process.stdin.flush()
        if not (told := self.line(SECONDS)):
            try:
                told = {"end": f"crash {self.process.wait(1)}", "says": self.said()}
            except subprocess.TimeoutExpired:
                self.process.kill()
                told = {"end": "hang", "says": self.said()}
            self.end()
        return told

    def line(self, seconds: float) -> dict[str, Any]:
        """What the process writes within that time."""
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return json.loads(self.process.stdout.readline() or "{}") if ready else {}

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-3000:].decode("utf-8", "replace")

    def end(self) -> None:
        if self.process is not None:
            self.process.communicate()
            self.errors.close()
            self.process = None


def fuzz(reader: str, count: int, seed: int) -> dict[str, Any]:
    """How many of `count` cases were read, refused or ended otherwise, and the seeds of those that did."""
    child, ends, odd = Child(reader), Counter(), {}
    for k in range(seed, seed + count):
        told = child.ask(k)
        if told["end"] == "hang":
            # On a busy machine what is slow once need not be so again.
            told = child.ask(k)
        end = told["end"]
        if end in ("read", "refused") and told["memory"] > 4 * told["size"] + SLACK:
            end = "memory"
            told["says"] = f"{told['memory'] >> 20} MB for files of {told['size']} bytes: {told['says']}"
        ends[end] += 1
        if end not in ("read", "refused"):
            odd[k] = f"{end}: {told.get('what', '')}: {told['says']}"
    child.end()
    return {"reader": reader, "cases": count, "seed": seed, "ends": dict(ends), "odd": odd}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("count", type=int, nargs="?", default=1000)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--serve", action="store_true", help="be the process that reads")
    args = parser.parse_args()
    if args.serve:
        serve(args.reader)
    else:
        found = fuzz(args.reader, args.count, args.seed)
        print(json.dumps(found | {"odd": len(found["odd"])}))
        print(*(f"seed {seed}: {what}" for seed, what in found["odd"].items()), sep="\n")
        sys.exit(bool(found["odd"]))

"""Reads damaged files in a process with limits on time and memory, and counts how that ends.

    python benchmarks/fuzz.py folder 1000 0       # reader, cases, seed
    python benchmarks/fuzz.py folder 1 417        # the case of seed 417 again, with what it raised

Every case damages one file of those that a reader of fuzz_readers.py names and reads it as the commands do. It should
be read, or refused with the error of one line that commands end with: anything else is counted by its seed. A case may
take 10 seconds, and memory 4 times what the files have and SLACK.
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
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from fuzz_readers import READERS, Reader

SECONDS, STARTUP = 10, 300
SLACK = 64 << 20
"""Bytes beyond 4 times the files: parsers and numpy work in steps of some size."""
LIMIT = 4 << 30
"""Bytes that the process may map beyond what it has: a case that wants more must not take the machine along."""


@dataclass(frozen=True)
class Place:
    """The whole files of a reader, and the copy that is damaged and read."""

    whole: Path
    copy: Path
    files: list[str]
    size: int
    reader: Reader


def place(reader: str, scratch: Path) -> Place:
    """Makes the files of a reader and reads them once, so that what is compiled or imported counts for no case."""
    made = READERS[reader]
    whole = made.make(scratch)
    files = [whole] if whole.is_file() else sorted(p for p in whole.rglob("*") if p.is_file())
    copy = scratch / "copy" / whole.name
    restored(whole, copy)
    damaged = [str(file.relative_to(whole)) for file in files if made.damages(file)]
    for name in damaged[:1] if made.writes else damaged:
        if (found := outcome(made.read, copy, copy / name))["end"] not in ("read", "refused"):
            raise SystemExit(found["says"])
        if made.writes:
            restored(whole, copy)
    soft = memory("VmSize") + LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))
    return Place(whole, copy, damaged, sum(file.stat().st_size for file in files), made)


def restored(whole: Path, copy: Path) -> None:
    """Puts a copy of what is whole in the place of whatever is there."""
    if copy.is_dir() and not copy.is_symlink():
        shutil.rmtree(copy)
    copy.unlink(missing_ok=True)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(whole, copy) if whole.is_dir() else shutil.copy(whole, copy)


def serve() -> None:
    """The child: told a reader it makes its files, told a seed too it damages and reads them; answers in JSON."""
    # The code that a config goes over which our decoders do not compute: its size is no reader's.
    from transformers.models.llama import modeling_llama  # noqa: F401

    from awq_jax.commands.ending import silence_libraries

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

    places: dict[str, Place] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for line in sys.stdin:
            reader, *seeds = line.split()
            if seeds:
                told = case(places[reader], int(seeds[0]))
            else:
                home = Path(scratch, reader)
                home.mkdir()
                places[reader] = place(reader, home)
                told = {"ready": True}
            if (said := printed()) and seeds:
                told |= {"end": "printed", "says": said}
            print(json.dumps(told), file=out, flush=True)


def case(place: Place, seed: int) -> dict[str, Any]:
    """Damages a file, reads it, puts the whole one back in its place."""
    from mutate import damage

    rng = np.random.default_rng(seed)
    name = place.files[rng.integers(len(place.files))]
    whole, changed = place.whole / name, place.copy / name
    what = damage(changed, rng)
    size = place.size - whole.stat().st_size + (changed.lstat().st_size if os.path.lexists(changed) else 0)
    before, began = forget_peak(), time.monotonic()
    told = outcome(place.reader.read, place.copy, changed)
    told |= {"what": what, "size": size, "memory": memory("VmHWM") - before, "seconds": time.monotonic() - began}
    part = Path(name).parts[0] if place.reader.writes else name
    restored(place.whole / part, place.copy / part)
    return told


def outcome(read: Callable[[Path, Path], None], path: Path, changed: Path) -> dict[str, Any]:
    from awq_jax.errors import InputError

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

    command = (sys.executable, __file__, "--serve")

    def __init__(self) -> None:
        self.process: Any = None
        self.made: set[str] = set()

    def ask(self, reader: str, seed: int) -> dict[str, Any]:
        """How the case of a seed ends."""
        if self.process is None:
            self.errors = tempfile.TemporaryFile()  # noqa: SIM115
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
            self.process = subprocess.Popen(self.command, **pipes, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        if reader not in self.made and "ready" not in self.answer(reader, STARTUP):
            raise SystemExit(f"the reader does not start:\n{self.said()}")
        self.made.add(reader)
        if not (told := self.answer(f"{reader} {seed}", SECONDS)):
            try:
                told = {"end": f"crash {self.process.wait(1)}", "says": self.said()}
            except subprocess.TimeoutExpired:
                self.process.kill()
                told = {"end": "hang", "says": self.said()}
            self.end()
        return told

    def answer(self, line: str, seconds: float) -> dict[str, Any]:
        """What the process writes to a line within that time."""
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return json.loads(self.process.stdout.readline() or "{}") if ready else {}

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-3000:].decode("utf-8", "replace")

    def end(self) -> None:
        if self.process is not None:
            self.process.communicate()
            self.errors.close()
            self.process, self.made = None, set()


def fuzz(reader: str, count: int, seed: int, child: Child | None = None) -> dict[str, Any]:
    """How many of `count` cases were read, refused or ended otherwise, and the seeds of those that did.

    Args:
      child: a process that read before, to start none.
    """
    asked, ends, odd, most = child or Child(), Counter(), {}, {"memory": 0, "times the files": 0.0, "seconds": 0.0}
    for k in range(seed, seed + count):
        told = asked.ask(reader, k)
        if told["end"] == "hang":
            # On a busy machine what is slow once need not be so again.
            told = asked.ask(reader, k)
        end = told["end"]
        if end in ("read", "refused"):
            times = {"memory": told["memory"], "times the files": told["memory"] / max(told["size"], 1)}
            most = {key: max(most[key], value) for key, value in (told | times).items() if key in most}
            if told["memory"] > 4 * told["size"] + SLACK:
                end = "memory"
                told["says"] = f"{told['memory'] >> 20} MB for files of {told['size']} bytes: {told['says']}"
        ends[end] += 1
        if end not in ("read", "refused"):
            odd[k] = f"{end}: {told.get('what', '')}: {told['says']}"
    if child is None:
        asked.end()
    return {"reader": reader, "cases": count, "seed": seed, "ends": dict(ends), "most": most, "odd": odd}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reader", choices=READERS, nargs="?")
    parser.add_argument("count", type=int, nargs="?", default=1000)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--serve", action="store_true", help="be the process that reads")
    args = parser.parse_args()
    if args.serve:
        serve()
    else:
        found = fuzz(args.reader, args.count, args.seed)
        print(json.dumps(found | {"odd": len(found["odd"])}))
        print(*(f"seed {seed}: {what}" for seed, what in found["odd"].items()), sep="\n")
        sys.exit(bool(found["odd"]))

"""What XLA launches, and what of it within a CUDA graph, by its listing of a compiled program."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any


def launches_in_the_loop(listing: str) -> list[tuple[str, str]]:
    """(what holds it, its name) of all that runs in the while loop, in order, by its indentation in XLA's listing."""
    found, holders = [], [(-1, "")]
    for line in listing[listing.index("body:") :].splitlines()[1:]:
        if not (match := re.match(r"( *)\d+: (\w+)", line)):
            continue
        indent, kind = match.groups()
        while holders[-1][0] >= len(indent):
            holders.pop()
        found.append((holders[-1][1], kind))
        holders.append((len(indent), kind))
    return found


def launches_of(lowered: Any) -> list[tuple[str, str]]:
    """The same of a lowered program with one while loop, which is compiled for it."""
    with tempfile.TemporaryDirectory() as folder:
        lowered.compile(compiler_options={"xla_dump_to": folder})
        # The listing after XLA's last passes is there if they changed something.
        listings = sorted(
            Path(folder).glob("*thunk_sequence*.txt"), key=lambda f: ("after" in f.name, f.stat().st_size)
        )
        if not listings:
            raise LookupError("XLA wrote no listing of what the program launches, as it does for GPUs")
        return launches_in_the_loop(listings[-1].read_text())

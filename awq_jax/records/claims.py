"""Claims: of several processes one does a piece of work, also if another is killed while it does it.

A claim is a lock on one byte of a file, which the system takes back when the process ends, however it ends.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two processes may do the same work there, neither loses any.
    fcntl = None


@contextmanager
def claims(file: Path) -> Iterator[Claims]:
    """Claims by that file; one object a process."""
    opened = os.open(file, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        yield Claims(opened)
    finally:
        os.close(opened)


class Claims:
    """The claims of this process."""

    def __init__(self, opened: int) -> None:
        self.opened = opened

    @contextmanager
    def claim(self, what: str, *, wait: bool = False) -> Iterator[bool]:
        """Whether the work of that name is this process's for the block; `wait` until it is."""
        if fcntl is None:
            yield True
            return
        at = int.from_bytes(hashlib.sha256(what.encode()).digest()[:7], "big")
        try:
            fcntl.lockf(self.opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, at)
        except (BlockingIOError, PermissionError):
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self.opened, fcntl.LOCK_UN, 1, at)

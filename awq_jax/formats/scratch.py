"""Scratch folders that go with the process that made them, however it ends.

Each holds a lock file that its process keeps locked, so that the next one knows which belong to the dead; and, while
files are moved, a journal with which moves that were cut short are taken back.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nobody can tell the dead from the living
    fcntl = None

PREFIX = ".awq_jax-"
LOCK = ".lock"
JOURNAL = "journal.json"
LIVE: set[Path] = set()
"""The scratch folders of this process."""
SETTLING = threading.RLock()
"""Held while a scratch folder is made or its files are moved; who ends the process at a signal takes it first."""


@contextmanager
def scratch_folder(home: Path | None = None) -> Iterator[Path]:
    """A folder in `home`, or among the system's temporary ones, gone when the block ends; what dead processes left
    there goes too.
    """
    home = home or Path(tempfile.gettempdir())
    remove_stale(home)
    with SETTLING:
        folder, lock = made(home)
        LIVE.add(folder)
    try:
        yield folder
    finally:
        with SETTLING:
            discard(folder)
            LIVE.discard(folder)
        os.close(lock)


def made(home: Path) -> tuple[Path, int]:
    """A new folder and its open, locked lock file."""
    while True:
        folder = home / f"{PREFIX}{secrets.token_hex(4)}"
        folder.mkdir(0o700)
        lock = folder / f"{socket.gethostname()}{LOCK}"
        # Another process may take the folder for that of a dead one until the lock is held.
        with suppress(FileNotFoundError):
            opened = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
            if locked(opened) is not False and lock.exists():
                return folder, opened
            os.close(opened)


def locked(lock: int) -> bool | None:
    """Whether this process has the lock now; None where the file system knows no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def remove_stale(home: Path) -> None:
    """Removes what dead processes of this machine left in `home`, and names what those of others may have left."""
    for folder in home.glob(f"{PREFIX}*"):
        if not is_mine(folder):
            continue
        # Empty: its process is making its lock, and makes another folder if this one goes, or died before.
        with suppress(OSError):
            folder.rmdir()
        for lock in folder.glob(f"*{LOCK}"):
            if lock.name != f"{socket.gethostname()}{LOCK}":
                name_foreign(folder, lock.name.removesuffix(LOCK))
                continue
            with suppress(OSError):
                opened = os.open(lock, os.O_RDWR)
                if locked(opened):
                    discard(folder)
                os.close(opened)


def is_mine(folder: Path) -> bool:
    """Whether this user made it: in a folder that all write to, a journal of somebody else's says what to move."""
    with suppress(OSError):
        found = folder.lstat()
        return stat.S_ISDIR(found.st_mode) and (not hasattr(os, "getuid") or found.st_uid == os.getuid())
    return False


@cache
def name_foreign(folder: Path, machine: str) -> None:
    note = "%s was left by a process on %s, or is in use there: remove it if nothing runs there."
    logging.getLogger(__name__).warning(note, folder, machine)


def discard(folder: Path) -> None:
    """Takes back moves that were cut short, then removes the folder."""
    undo(folder)
    # A thread that is about to end with its process may still write here.
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


def discard_all() -> None:
    """For who ends the process: removes its scratch folders; moves begin no more, and those under way end first."""
    SETTLING.acquire(timeout=10)
    for folder in list(LIVE):
        discard(folder)


def move_all(scratch: Path, moves: Sequence[tuple[Path, Path]]) -> None:
    """Renames each first path to the second, in order: all of them, or after an error none."""
    home = scratch.parent
    pairs = [[os.path.relpath(path, home) for path in pair] for pair in moves]
    (scratch / JOURNAL).write_text(json.dumps(pairs))
    try:
        for a, b in moves:
            a.rename(b)
    except BaseException:
        undo(scratch)
        raise
    (scratch / JOURNAL).unlink()


def undo(scratch: Path) -> None:
    """Takes back the moves of a journal."""
    with suppress(OSError, ValueError):
        for a, b in reversed(json.loads((scratch / JOURNAL).read_text())):
            a, b = scratch.parent / a, scratch.parent / b
            if os.path.lexists(b) and not os.path.lexists(a):
                b.rename(a)
        (scratch / JOURNAL).unlink()

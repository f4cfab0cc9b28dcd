"""Scratch folders that go with the process that made them, however it ends.

Each holds a lock file that its process keeps locked, so that the next one knows which belong to the dead.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from awq_jax.formats.moves import take_back

try:
    import fcntl
except ImportError:  # Windows, where nobody can tell the dead from the living
    fcntl = None

PREFIX = ".awq_jax-"
NAMES = PREFIX + "[0-9a-f]" * 8
LOCK = ".lock"
LIVE: set[Path] = set()
"""The scratch folders of this process."""
OUTPUTS: dict[Path, bool] = {}
"""Destinations of this process: whether what was to come there is there; none while it is brought there."""
SETTLING = threading.RLock()
"""Held while a scratch folder is made or its files are moved; who ends the process at a signal takes it first."""


@contextmanager
def scratch_folder(home: Path | None = None) -> Iterator[Path]:
    """A folder in `home`, or among the system's temporary ones, gone when the block ends; what dead processes left
    there goes too.
    """
    home = (home or Path(tempfile.gettempdir())).resolve()
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
        lock = folder / f"{'+'.join(machine())}{LOCK}"
        # Another process may take the folder for that of a dead one until the lock is held.
        with suppress(FileNotFoundError):
            opened = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
            if locked(opened) is not False and lock.exists():
                return folder, opened
            os.close(opened)


def machine() -> tuple[str, str]:
    """The names of the machine and of its running system: another container has another of the first, the same machine
    after a start another of the second, and whoever has one of them in common sees the same locks or is dead.
    """
    system = ""
    with suppress(OSError):
        system = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname(), system


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
    """Removes what dead processes of this machine left in `home`, and names what may be of the dead."""
    for folder in home.resolve().glob(NAMES):
        if folder in LIVE or not is_mine(folder):
            continue
        # Empty: its process is making its lock, and makes another folder if this one goes, or died before.
        with suppress(OSError):
            folder.rmdir()
        if (lock := lock_of(folder)) is None:
            discard(folder)
            continue
        host, _, system = lock.name.removesuffix(LOCK).partition("+")
        with suppress(OSError):
            opened = os.open(lock, os.O_RDWR)
            ours = host == machine()[0] or (system and system == machine()[1])
            dead = locked(opened) if ours else None
            if dead:
                discard(folder)
            elif dead is None:
                name_left(lock, host)
            os.close(opened)


def lock_of(folder: Path) -> Path | None:
    """The lock file of a scratch folder; none while it is made, and once a user removed it."""
    return next(folder.glob(f"*{LOCK}"), None)


def is_mine(folder: Path) -> bool:
    """Whether this user made it: in a folder that all write to, somebody else's could hold files to be put back."""
    with suppress(OSError):
        found = folder.lstat()
        return stat.S_ISDIR(found.st_mode) and (not hasattr(os, "getuid") or found.st_uid == os.getuid())
    return False


@cache
def name_left(lock: Path, host: str) -> None:
    note = "%s was left by a process on %s, or is in use there: if nothing runs there, %s."
    logging.getLogger(__name__).warning(note, lock.parent, host, release(lock))


@cache
def name_kept(folder: Path) -> None:
    note = "%s holds files of an earlier output that cannot be put back: move them by hand, then remove it."
    logging.getLogger(__name__).warning(note, folder)


def release(lock: Path) -> str:
    """What to do with the folder of a process that died where nobody can tell."""
    return f"remove {lock}, and the next run puts back what was moved and removes the rest"


def discard(folder: Path) -> None:
    """Takes back moves that were cut short, then removes the folder, unless what was moved finds no place."""
    if not take_back(folder):
        name_kept(folder)
        return
    # A thread that is about to end with its process may still write here: under another name it finds nothing.
    aside = folder.with_name(PREFIX + secrets.token_hex(4))
    for _ in range(20):
        with suppress(OSError):
            folder.rename(aside)
        for path in (aside, folder):
            shutil.rmtree(path, ignore_errors=True)
        if not folder.exists() and not aside.exists():
            return
        time.sleep(0.05)


def outcome() -> str:
    """For who ends the process: what is at the last destination; nothing where that is not known, or goes with it."""
    out, done = next(reversed(OUTPUTS.items()), (None, False))
    if out is None or any(out.is_relative_to(folder) for folder in LIVE):
        return ""
    return f"{out} {'is complete' if done else 'is as it was' if out.exists() else 'was not written'}"


def discard_all() -> None:
    """For who ends the process: removes its scratch folders; moves begin no more, and those under way end first."""
    SETTLING.acquire(timeout=10)
    for folder in list(LIVE):
        discard(folder)

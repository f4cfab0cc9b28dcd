"""Folders that are there whole or not at all, and that replace none but their like.

Every one has a manifest, which lists its files: what is not on the list, or not as it was, is somebody else's.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from awq_jax.errors import InputError
from awq_jax.formats.exchange import exchange
from awq_jax.formats.manifest import MANIFEST, files_of, is_as_written, read_manifest, write_manifest
from awq_jax.formats.moves import NEW, move_in
from awq_jax.formats.scratch import NAMES, OUTPUTS, SETTLING, is_mine, lock_of, release, remove_stale, scratch_folder

NOTHING = "Nothing was written."
SYSTEM = ("/proc", "/sys", "/dev")
"""Folders in which the system shows itself: what is written there, where it can be, is gone with the next start."""
SHARED_MEMORY = "/dev/shm"


@contextmanager
def written_whole(folder: str | Path, *, overwrite: bool = False, inputs: Iterable[str | Path] = ()) -> Iterator[Path]:
    """A scratch folder that becomes `folder` only when the block ends without an error.

    It lies beside `folder`, hence on the same disk, and goes away if the block raises (disk full, Ctrl-C): what was
    at `folder` before stays as it was. A mount point, and a folder in one that cannot be written, is filled in place:
    the scratch folder lies in it, and its files are moved up at the end, config.json and the manifest last.

    Args:
      folder: the destination; folders above it are made.
      overwrite: replace what an earlier call wrote there, at the end of the block and not before.
      inputs: files and folders that the block reads; names of something else are passed over.

    Raises:
      FileExistsError: the destination is a file, holds a file that no earlier call wrote, or any and `overwrite` is
        not set. Raised before the block runs, and again at its end if the destination was filled meanwhile.
      InputError: the destination is or contains an input, the working directory or the home folder, or belongs to the
        system.
      PermissionError: it cannot be written.
    """
    out = resolved(folder)
    home = check_destination(out, overwrite=overwrite, inputs=inputs)
    with scratch_folder(home) as scratch:
        new = scratch / NEW / out.relative_to(home)
        new.mkdir(parents=True)
        OUTPUTS.pop(out, None)
        OUTPUTS[out] = False
        yield new
        for file in write_manifest(new):
            flush(new / file)
        with SETTLING:
            del OUTPUTS[out]
            put(new, out, scratch, overwrite)
            OUTPUTS[out] = True
        flush(home)


def resolved(folder: str | Path) -> Path:
    """The absolute path behind `~` and links.

    Raises:
      InputError: a link leads back to itself.
    """
    path = os.path.realpath(os.path.expanduser(folder))
    if os.path.islink(path):
        raise InputError(f"{folder} is a link that leads back to itself: remove it, or choose another folder.")
    return Path(path)


def check_destination(out: str | Path, *, overwrite: bool = False, inputs: Iterable[str | Path] = ()) -> Path:
    """The folder for scratch folders of a destination that `written_whole` would fill; raises what it raises."""
    out = resolved(out)
    if (at := next(filter(out.is_relative_to, SYSTEM), None)) and not out.is_relative_to(SHARED_MEMORY):
        raise InputError(f"{out} lies in {at}, where the system keeps no files: choose another folder. {NOTHING}")
    above = next((path for path in out.parents if path.exists()), out)
    if not above.is_dir() or (out.exists() and not out.is_dir()):
        raise FileExistsError(f"{out if above.is_dir() else above} is a file: choose another folder. {NOTHING}")
    if out.exists():
        refuse_around(out, inputs)
    inside = out.exists() and (is_mount(out) or not writable(above))
    home = out if inside else above
    if not writable(home) or (out.exists() and not writable(out)):
        raise PermissionError(
            f"{home if not writable(home) else out} cannot be written: choose another folder. {NOTHING}"
        )
    remove_stale(home)
    try:
        # Some file systems promise with their modes what they refuse.
        with SETTLING:
            os.rmdir(tempfile.mkdtemp(dir=home))
    except OSError as e:
        raise PermissionError(f"{home} cannot be written ({e.strerror}): choose another folder. {NOTHING}") from e
    if out.exists():
        refuse_occupied(out, overwrite)
    return home


def refuse_around(out: Path, inputs: Iterable[str | Path]) -> None:
    """Refuse a folder whose loss would cost more than an earlier output."""
    kept = {f"the input {path}": resolved(path) for path in inputs}
    kept |= {"the working directory": Path.cwd(), "the home folder": resolved("~")}
    for name, path in kept.items():
        if os.path.exists(path) and any(above.samefile(out) for above in (path, *path.parents)):
            raise InputError(f"{out} is or contains {name}: choose another folder for the output. {NOTHING}")


def refuse_occupied(out: Path, overwrite: bool, *, at: Path | None = None, scratch: Path | None = None) -> None:
    """Refuse a folder that holds what may not be replaced.

    Args:
      at: where its files are at the moment.
      scratch: a folder in it to pass over.
    """
    at = at or out
    found = sorted(file for file in files_of(at) if scratch is None or not (at / file).is_relative_to(scratch))
    marks = read_manifest(at)
    others = [folder for folder in at.glob(NAMES) if folder != scratch and is_mine(folder)]
    if lock := next(filter(None, map(lock_of, others)), None):
        raise FileExistsError(
            f"{out} holds {lock.parent.name} of another run of awq_jax: wait for its end, or, if nothing runs, "
            f"{release(lock)}. {NOTHING}"
        )
    if foreign := next((file for file in found if not is_as_written(at, file, marks)), None):
        if foreign in marks:
            why = "which is not as awq_jax wrote it"
        elif marks:
            why = "which awq_jax did not write"
        else:
            why = f"which no {MANIFEST} lists, so awq_jax did not write it"
        raise FileExistsError(f"{out} holds {foreign}, {why}: move it away or choose another folder. {NOTHING}")
    if found and not overwrite:
        raise FileExistsError(
            f"{out} is not empty: give overwrite=True to replace it, or choose another folder. {NOTHING}"
        )


def put(new: Path, out: Path, scratch: Path, overwrite: bool) -> None:
    """Bring `new` to `out`."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        new.rename(out)
        return
    refuse_occupied(out, overwrite, scratch=scratch)
    shutil.copymode(out, new)
    if not scratch.is_relative_to(out) and exchange(new, out):
        try:
            refuse_occupied(out, overwrite, at=new)
        except FileExistsError:
            exchange(new, out)
            raise
        return
    move_in(scratch, new.relative_to(scratch / NEW), lambda old: refuse_occupied(out, overwrite, at=old))


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def is_mount(folder: Path) -> bool:
    """Whether a file system is mounted here, also a folder of the one around it."""
    if os.path.ismount(folder):
        return True
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    return os.fsencode(folder) in (line.split()[4].decode("unicode_escape").encode("latin-1") for line in mounts)


def writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def flush(path: Path) -> None:
    """What was written there reaches the disk, so that a power loss after a rename finds it whole."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError:  # a file system that knows no such thing
        pass
    finally:
        os.close(opened)

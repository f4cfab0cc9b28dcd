"""Folders that are there whole or not at all, and that replace none but their like.

Every one has a manifest, which lists its files: what is not on the list is somebody else's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from awq_jax.formats.errors import InputError
from awq_jax.formats.exchange import exchange
from awq_jax.formats.files import inside, read_json
from awq_jax.formats.scratch import NAMES, SETTLING, is_mine, lock_of, move_all, release, remove_stale, scratch_folder

MANIFEST = "awq_jax_files.json"
NOTHING = "Nothing was written."


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
      InputError: the destination is or contains an input, the working directory or the home folder.
      PermissionError: it cannot be written.
    """
    out = resolved(folder)
    home = check_destination(out, overwrite=overwrite, inputs=inputs)
    with scratch_folder(home) as scratch:
        new = scratch / "new"
        new.mkdir()
        yield new
        files = sorted(files_of(new))
        manifest = {"about": "Written by awq_jax, which replaces nothing else.", "version": 1, "files": files}
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
        for file in (*files, MANIFEST):
            flush(new / file)
        with SETTLING:
            put(new, out, scratch, overwrite)
        flush(home)


def resolved(folder: str | Path) -> Path:
    """The absolute path behind `~` and links."""
    return Path(os.path.expanduser(folder)).resolve()


def check_destination(out: str | Path, *, overwrite: bool = False, inputs: Iterable[str | Path] = ()) -> Path:
    """The folder for scratch folders of a destination that `written_whole` would fill; raises what it raises."""
    out = resolved(out)
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
    found = [file for file in files_of(at) if scratch is None or not (at / file).is_relative_to(scratch)]
    listed = manifest_of(at)
    others = [folder for folder in at.glob(NAMES) if folder != scratch and is_mine(folder)]
    if lock := next(filter(None, map(lock_of, others)), None):
        raise FileExistsError(
            f"{out} holds {lock.parent.name} of another run of awq_jax: wait for its end, or, if nothing runs, "
            f"{release(lock)}. {NOTHING}"
        )
    if foreign := sorted(set(found) - listed):
        why = "which awq_jax did not write" if listed else f"and no {MANIFEST}, so awq_jax did not write it"
        raise FileExistsError(f"{out} holds {foreign[0]}, {why}: move it away or choose another folder. {NOTHING}")
    if found and not overwrite:
        raise FileExistsError(
            f"{out} is not empty: give overwrite=True to replace it, or choose another folder. {NOTHING}"
        )


def files_of(folder: Path) -> Iterator[str]:
    """Relative paths of all that is no folder, and of folders that cannot be looked into."""
    unread: list[str] = []
    for where, folders, files in os.walk(folder, onerror=lambda e: unread.append(e.filename)):
        links = [name for name in folders if os.path.islink(os.path.join(where, name))]
        yield from (os.path.relpath(os.path.join(where, name), folder) for name in (*files, *links))
    yield from (os.path.relpath(path, folder) for path in unread if os.path.basename(path) != "lost+found")


def manifest_of(folder: Path) -> set[str]:
    """What `written_whole` wrote there, the manifest too; nothing where there is no manifest."""
    try:
        file = inside(folder, MANIFEST)
        return {MANIFEST, *read_json(file)["files"]} if file else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


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
    old = scratch / "old"
    old.mkdir()
    # A folder without JSON files is no model to any reader: they go first and come last.
    model_last = lambda name: (name == MANIFEST, name.endswith(".json"), name)
    there = {Path(name).parts[0] for name in files_of(out)} - {scratch.name}
    gone = sorted(there, key=model_last, reverse=True)
    come = sorted(os.listdir(new), key=model_last)
    move_all(scratch, [(out / name, old / name) for name in gone] + [(new / name, out / name) for name in come])


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

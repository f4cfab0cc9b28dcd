"""The list of the files of a folder, by which this project knows those that it wrote from all others."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from awq_jax.files import inside, read_json

MANIFEST = "awq_jax_files.json"


def write_manifest(folder: Path) -> list[str]:
    """Lists all files of `folder` in a file there; the names of all, this one last."""
    files = sorted(files_of(folder))
    marks = {name: mark(folder / name) for name in files}
    manifest = {"about": "Written by awq_jax, which replaces nothing else.", "version": 1, "files": marks}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    return [*files, MANIFEST]


def read_manifest(folder: Path) -> dict[str, str]:
    """The mark of each file that was written there, its own too; nothing where there is no list, or a damaged one."""
    try:
        file = inside(folder, MANIFEST)
        return {**read_json(file)["files"], MANIFEST: mark(file)} if file else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def is_as_written(folder: Path, name: str, marks: Mapping[str, str]) -> bool:
    """Whether a file of `folder` is the one that `read_manifest` lists."""
    found = mark(folder / name)
    return bool(found) and marks.get(name) == found


def mark(file: Path) -> str:
    """What tells a file from another of its name, also in a copy; "" for what this project writes nowhere, a link say.

    Its size and a digest of all of it.
    """
    try:
        found = file.lstat()
        if not stat.S_ISREG(found.st_mode):
            return ""
        with file.open("rb") as opened:
            return f"{found.st_size} {hashlib.file_digest(opened, 'sha256').hexdigest()}"
    except OSError:
        return ""


def files_of(folder: Path) -> Iterator[str]:
    """Relative paths of all that is no folder, and of folders that cannot be looked into."""
    unread: list[str] = []
    for where, folders, files in os.walk(folder, onerror=lambda e: unread.append(e.filename)):
        links = [name for name in folders if os.path.islink(os.path.join(where, name))]
        yield from (os.path.relpath(os.path.join(where, name), folder) for name in (*files, *links))
    yield from (os.path.relpath(path, folder) for path in unread if os.path.basename(path) != "lost+found")

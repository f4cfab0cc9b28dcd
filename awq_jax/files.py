"""Files that others wrote: which of them are opened, and how much of them."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from awq_jax.errors import InputError, reading

LARGEST = 100_000_000
"""Bytes of a file that is parsed whole; safetensors bounds its headers likewise."""
DEEPEST = 100
"""Levels of lists and objects in JSON."""
KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}


def inside(folder: Path, name: str) -> Path | None:
    """The file of that name in a model's folder, None if there is none.

    Raises:
      InputError: a name or a link that leads out of the folder, save into the blobs of the Hugging Face hub's cache;
        a link to nothing; something other than a file.
    """
    file = folder / name
    with reading(f"{file} is no file of the model", "give a folder without such links"):
        real = file.resolve()
        within = real.is_relative_to(folder.resolve())
    if not (within or is_blob(real)):
        raise InputError(f"{file} leads to {real}, outside of the model's folder: put a copy of the file there.")
    if not os.path.lexists(file):
        return None
    if not real.exists():
        raise InputError(f"{file} is a link to {real}, which is not there: finish the download.")
    return regular(file)


def is_blob(file: Path) -> bool:
    """Whether this is where the hub's cache keeps the files that a model's folder links to."""
    return file.parent.name == "blobs" and file.parent.parent.name.startswith("models--")


def regular(file: Path, largest: int | None = None) -> Path:
    """`file`, if it is a file and no larger than that; others may block whoever opens them.

    Raises:
      InputError: it is something else, or larger.
      OSError: it is not there or cannot be looked at.
    """
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{file} is a {KINDS.get(stat.S_IFMT(found.st_mode), 'device')}: give a file.")
    if largest is not None and found.st_size > largest:
        raise InputError(f"{file} has {found.st_size} bytes, {largest} at most are read: it is not what it should be.")
    return file


def read_text(file: Path, remedy: str = "give a text file in UTF-8", largest: int | None = None) -> str:
    """A text in UTF-8, with or without a byte order mark.

    Raises:
      InputError: other bytes, no file, or a file that is larger.
      OSError: it is not there or cannot be read.
    """
    with reading(f"{file} is not text in UTF-8", remedy):
        return regular(file, largest).read_text("utf-8-sig")


def parse_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
      InputError: it is no JSON, too large or nested too deep.
      OSError: it is not there or cannot be read.
    """
    text = read_text(file, "download it again", LARGEST)
    with reading(f"{file} is not JSON", "download it again"):
        found = json.loads(text)
        level, depth = [found], 0
        while level := [child for node in level for child in children(node)]:
            depth += 1
            if depth > DEEPEST:
                raise ValueError(f"nested more than {DEEPEST} deep")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds; see `parse_json`."""
    found = parse_json(file)
    if not isinstance(found, dict):
        raise InputError(f"{file} holds a {type(found).__name__}, not an object: download it again.")
    return found


def children(node: Any) -> list[Any]:
    """What a list or object of JSON holds."""
    return list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []

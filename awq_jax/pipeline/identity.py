"""Which checkpoint a folder holds: a digest of all that decides what it answers, whatever the folder is called."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from awq_jax.formats.manifest import MANIFEST, files_of
from awq_jax.pipeline.report import REPORT, read_report

BESIDE = {MANIFEST, REPORT, "README.md"}
"""Files that change no answer."""


def digest_of(path: Path) -> str:
    """A hash of a checkpoint's file, or of all files of its folder, save hidden ones and other models below it."""
    names = sorted(filter(of_model(path), files_of(path))) if path.is_dir() else [""]
    whole = hashlib.sha256()
    for name in names:
        with (path / name if name else path).open("rb") as opened:
            whole.update(f"{name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def of_model(folder: Path) -> Callable[[str], bool]:
    """Whether a file of a folder, by its relative path, is one of the model there: an output may lie in its source."""
    others = [file.parent.relative_to(folder) for file in folder.rglob("config.json") if file.parent != folder]
    below = lambda name: any(Path(name).is_relative_to(other) for other in others)
    hidden = lambda name: any(part.startswith(".") for part in Path(name).parts)
    return lambda name: name not in BESIDE and not hidden(name) and not below(name)


def sites_of(path: Path) -> list[list[Any]]:
    """`[name, bits, error, error of rounding to nearest]` of each site, from the report of its quantization if it has
    one."""
    return read_report(
        path,
        lambda site: [str(site["name"]), int(site["spec"]["bits"]), float(site["error"]), float(site["nearest_error"])],
    )

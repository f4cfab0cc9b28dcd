"""Which checkpoint a folder holds: a digest of all that decides what it answers, whatever the folder is called."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from awq_jax.formats.manifest import MANIFEST, files_of
from awq_jax.pipeline.report import REPORT, read_report

BESIDE = {MANIFEST, REPORT, "README.md", ".gitattributes", ".gitignore"}
"""Files that change no answer."""


def digest_of(path: Path) -> str:
    """A hash of a checkpoint's file, or of all files of its folder."""
    names = sorted(set(files_of(path)) - BESIDE) if path.is_dir() else [""]
    whole = hashlib.sha256()
    for name in names:
        with (path / name if name else path).open("rb") as opened:
            whole.update(f"{name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def sites_of(path: Path) -> list[list[Any]]:
    """`[name, bits, error, error of rounding to nearest]` of each site, from the report of its quantization if it has
    one."""
    return read_report(
        path,
        lambda site: [str(site["name"]), int(site["spec"]["bits"]), float(site["error"]), float(site["nearest_error"])],
    )

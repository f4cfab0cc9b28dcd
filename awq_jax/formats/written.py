"""Folders that are there whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A scratch folder that becomes `folder` only when the block ends without an error.

    It lies beside `folder`, hence on the same disk, and goes away if the block raises (disk full, Ctrl-C): what was
    at `folder` before stays as it was.

    Args:
      folder: the destination; folders above it are made.
      overwrite: replace a destination that holds something, at the end of the block and not before.

    Raises:
      FileExistsError: the destination is a file, or holds something and `overwrite` is not set. Raised before the
        block runs, and again at its end if the destination was filled meanwhile.
    """
    folder = Path(folder).expanduser().resolve()
    refuse_occupied(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        yield new
        refuse_occupied(folder, overwrite)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise


def refuse_occupied(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: choose another folder. Nothing was written.")
    if not overwrite and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} is not empty: give overwrite=True to replace it, or choose another folder. Nothing was written."
        )

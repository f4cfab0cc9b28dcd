"""The files of a folder replaced one by one, where it cannot change places with the new one as a whole.

The scratch folder has new/WAY and old/WAY, WAY leading from where it lies to the folder. The manifest comes last: as
long as it is in new/WAY the moves are not done, and `take_back` undoes them, also those of a process that died.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from awq_jax.formats.manifest import MANIFEST, files_of, is_as_written, read_manifest

NEW, OLD = "new", "old"


def move_in(scratch: Path, way: Path, check: Callable[[Path], None]) -> None:
    """Replaces what is at `way` by what is in the scratch folder, or raises and leaves what was there.

    Args:
      check: told where the old files are once they are out of the way; raises if they must not be replaced.
    """
    out, new, old = scratch.parent / way, scratch / NEW / way, scratch / OLD / way
    # A folder without JSON files is no model to any reader: they go first and come last.
    model_last = lambda name: (name == MANIFEST, name.endswith(".json"), name)
    old.mkdir(parents=True)
    try:
        for name in sorted(tops(files_of(out)) - {scratch.name}, key=model_last, reverse=True):
            (out / name).rename(old / name)
        check(old)
        for name in sorted(os.listdir(new), key=model_last):
            (new / name).rename(out / name)
    except BaseException:
        take_back(scratch)
        raise


def take_back(scratch: Path) -> bool:
    """Undoes moves that were cut short; whether the scratch folder may go, since no old file is left in it.

    New files are told from others by their manifest, and nothing is moved over another or to where a link leads.
    """
    if not (scratch / OLD).exists():
        return True
    for manifest in (scratch / NEW).rglob(MANIFEST):
        new = manifest.parent
        way = new.relative_to(scratch / NEW)
        out, old, marks = scratch.parent / way, scratch / OLD / way, read_manifest(new)
        if any(not folder.is_dir() or folder.resolve() != folder for folder in (out, old, new)):
            continue
        others = tops(file for file in files_of(out) if not is_as_written(out, file, marks))
        for name in tops(files_of(out)) - others - {*os.listdir(new)}:
            (out / name).rename(new / name)
        for name in {*os.listdir(old)} - {*os.listdir(out)}:
            (old / name).rename(out / name)
    left = lambda part: next(files_of(scratch / part), None) is not None
    return not (left(OLD) and left(NEW))


def tops(files: Iterable[str]) -> set[str]:
    """The first parts of paths."""
    return {Path(file).parts[0] for file in files}

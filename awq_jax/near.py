"""What a misspelled name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean ...?)" where one of the known names is near, else nothing."""
    lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    return f" (did you mean {lower[near[0]]}?)" if near else ""


def names_in(folder: Path) -> list[str]:
    """The names in a folder, none where it cannot be read."""
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []

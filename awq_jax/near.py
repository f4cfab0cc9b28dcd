"""What a misspelled name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean ...?)" where one of the known names is near, else nothing."""
    lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    return f" (did you mean {lower[near[0]]}?)" if near else ""

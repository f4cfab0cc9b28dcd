"""Two folders change places in one step, where the system can."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

HERE = -100
EXCHANGE = 2


def exchange(a: Path, b: Path) -> bool:
    """Whether `a` and `b` changed places, at once; False where the system, the file system or a mount prevents it."""
    rename = renameat2()
    return rename is not None and rename(HERE, os.fsencode(a), HERE, os.fsencode(b), EXCHANGE) == 0


@cache
def renameat2() -> Any:
    """Linux's rename with flags, None elsewhere."""
    found = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if found is not None:
        found.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return found

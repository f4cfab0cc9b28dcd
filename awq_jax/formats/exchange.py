"""Two folders change places in one step, where the system can."""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from pathlib import Path
from typing import Any

HERE = -100
EXCHANGE = 2
CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EBUSY, errno.EXDEV)


def exchange(a: Path, b: Path) -> bool:
    """Whether `a` and `b` changed places, at once; False where the system, the file system or a mount prevents it.

    Raises:
      OSError: anything else that went wrong.
    """
    if (rename := renameat2()) is None:
        return False
    if rename(HERE, os.fsencode(a), HERE, os.fsencode(b), EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(a), None, str(b))


@cache
def renameat2() -> Any:
    """Linux's rename with flags, None elsewhere."""
    found = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if found is not None:
        found.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return found

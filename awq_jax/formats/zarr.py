"""Arrays in zarr's format, checked before they are read: their reader takes all memory that a header asks for, and ends
the process where there is not so much.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from awq_jax.files import LARGEST, children, regular

HEADER = ".zarray"
MOST = 1 << 15
"""Bytes that one byte of zstd can stand for, and any format that puts 128 KiB into a block of 4 bytes or more."""


def check_array(folder: Path) -> None:
    """Passes if the chunks that a header asks for are all there, and are large enough for what they should hold.

    Raises:
      ValueError: they are not, or the header cannot be read.
    """
    header = json.loads(regular(folder / HEADER, LARGEST).read_bytes())
    shape, chunks = (children(header.get(name)) for name in ("shape", "chunks"))
    if len(shape) != len(chunks) or any(type(n) is not int or n < 1 for n in (*shape, *chunks)):
        raise ValueError(f"{folder.name} has shape {shape}, chunks {chunks}")
    if any(chunk > n for n, chunk in zip(shape, chunks, strict=True)):
        raise ValueError(f"{folder.name} has chunks {chunks}, larger than shape {shape}")
    count = math.prod(-(-n // chunk) for n, chunk in zip(shape, chunks, strict=True))
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != HEADER]
    if len(sizes) != count:
        raise ValueError(f"{folder.name}: {len(sizes)} of {count} chunks are there")
    if math.prod(shape) > MOST * sum(sizes):
        raise ValueError(f"{folder.name}: {sum(sizes)} bytes are too few for shape {shape}")

"""Safetensors files of some 4 GB, written a few tensors at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from awq_jax.formats.huggingface import write_json
from awq_jax.formats.safetensors import DTYPES, INDEX, SINGLE

LIMIT = 4 * 10**9
"""Bytes of tensors in a file; one call's tensors stay together, so they alone may be more."""
CODES = {dtype: code for code, dtype in DTYPES.items()}


class ShardWriter:
    """Writes tensors to a folder: model.safetensors, or several files and their index. Memory holds one call's tensors.

    The data of a file is gathered by dtype, since readers want tensors at multiples of their item's size; the header,
    which comes first, is known last.
    """

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder, limit
        self.shards: list[list[str]] = []
        self.nbytes = 0
        self.entries: dict[np.dtype, dict[str, tuple[tuple[int, ...], int]]] = {}

    def add(self, tensors: Mapping[str, Shaped[np.ndarray, "*shape"]]) -> None:
        """Adds tensors to the current file, or begins another if they do not fit."""
        held = sum(size for entries in self.entries.values() for _, size in entries.values())
        if held and held + sum(w.nbytes for w in tensors.values()) > self.limit:
            self._close()
        for name, w in tensors.items():
            with self._data(w.dtype).open("ab") as file:
                file.write(np.ascontiguousarray(w).reshape(-1).view(np.uint8).data)
            self.entries.setdefault(w.dtype, {})[name] = (w.shape, w.nbytes)

    def finish(self) -> None:
        """Names the files, and writes the index if there are several."""
        self._close()
        count, where = len(self.shards), {}
        for i, names in enumerate(self.shards, 1):
            final = SINGLE if count == 1 else f"model-{i:05}-of-{count:05}.safetensors"
            self._shard(i).rename(self.folder / final)
            where |= dict.fromkeys(names, final)
        if count > 1:
            write_json(self.folder / INDEX, {"metadata": {"total_size": self.nbytes}, "weight_map": where})

    def _close(self) -> None:
        """Puts the header before the data."""
        # Readers refuse files whose metadata does not say "pt".
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at, dtypes = 0, sorted(self.entries, key=lambda dtype: (-dtype.itemsize, CODES[dtype]))
        for dtype in dtypes:
            for name, (shape, size) in self.entries[dtype].items():
                header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": (at, at + size)}
                at += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.shards.append([name for entries in self.entries.values() for name in entries])
        with self._shard(len(self.shards)).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for dtype in dtypes:
                with self._data(dtype).open("rb") as data:
                    shutil.copyfileobj(data, file, 2**24)
                self._data(dtype).unlink()
        self.entries, self.nbytes = {}, self.nbytes + at

    def _shard(self, i: int) -> Path:
        return self.folder / f"model-{i:05}.safetensors"

    def _data(self, dtype: np.dtype) -> Path:
        return self.folder / f"{CODES[dtype]}.data"

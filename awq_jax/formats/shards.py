"""Safetensors files, checked when they are opened and mapped one tensor at a time.

An own reader of the 20-line format, because each mapping ends with its tensor (memory stays at one tensor), bfloat16
arrives as ml_dtypes' and a damaged file is named with its remedy before any work starts.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from awq_jax.formats.errors import InputError
from awq_jax.formats.stored import StoredTensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BOOL": np.dtype(bool),
    **{f"F{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)},
    **{f"I{8 * n}": np.dtype(f"<i{n}") for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": np.dtype(f"<u{n}") for n in (1, 2, 4, 8)},
}


def open_shards(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder with one safetensors file, or several and their index.

    Raises:
      InputError: no safetensors files, an index that does not fit the files, a damaged file.
    """
    if (folder / SINGLE).exists():
        return open_shard(folder / SINGLE)
    if (folder / INDEX).exists():
        return open_indexed(folder)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return open_shard(files[0])
    if files:
        raise InputError(
            f"{folder} holds {len(files)} safetensors files but no {INDEX} to say which belong to the model: "
            "download the index too."
        )
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in sorted(folder.glob(pattern))]
    if pickles:
        raise InputError(
            f"{folder} holds {pickles[0]} but no safetensors file; pickled weights can run code, so they are not "
            "read. Convert them where you trust them, with transformers' "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other_folder)."
        )
    raise InputError(f"{folder} holds no safetensors file: give the folder of a Hugging Face model.")


def open_indexed(folder: Path) -> dict[str, StoredTensor]:
    """The tensors that the index names, each in the shard that the index says."""
    try:
        where: dict[str, str] = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
        shards = sorted(set(where.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{folder / INDEX} is not an index of safetensors files ({e!r}): download it again.") from e
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise InputError(
            f"{folder} lacks {missing[0]}, one of {len(missing)} missing of the {len(shards)} shards that {INDEX} "
            "names: finish the download."
        )
    opened = {shard: open_shard(folder / shard) for shard in shards}
    for name, shard in where.items():
        if name not in opened[shard]:
            raise InputError(f"{folder / shard} has no tensor {name}, which {INDEX} places there: download both again.")
    return {name: opened[shard][name] for name, shard in where.items()}


def open_shard(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file; nothing but its header is read.

    Raises:
      InputError: the file is cut short, is not safetensors, or holds a dtype that numpy has no room for.
    """
    size = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(8)
        if start == b"version ":
            raise InputError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder.")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or 8 + length > size:
            raise InputError(
                f"{file} has {size} bytes and its header would take {8 + length}: it is cut short or no safetensors "
                "file. Download it again."
            )
        try:
            header: dict[str, Any] = json.loads(f.read(length))
            header.pop("__metadata__", None)
            tensors = {name: stored(file, 8 + length, name, entry) for name, entry in header.items()}
            needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{file} has no readable safetensors header ({e!r}): download it again.") from e
    if needed > size:
        raise InputError(f"{file} is cut short: {size} of its {needed} bytes are there. Download it again.")
    return tensors


def stored(file: Path, data: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    """The tensor that one header entry describes, its data counted from byte `data` of the file."""
    if entry["dtype"] not in DTYPES:
        raise InputError(
            f"{file}: {name} is stored as {entry['dtype']}, which is not supported: convert the model to bfloat16, "
            "float16 or float32 first."
        )
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise InputError(
            f"{file}: {name} of shape {shape} in {entry['dtype']} takes {math.prod(shape) * dtype.itemsize} bytes, "
            f"the header gives it {end - begin}: the file is damaged, download it again."
        )
    return StoredTensor(shape, end - begin, lambda: mapped(file, data + begin, shape, dtype), stored_as=dtype.name)


def mapped(file: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Shaped[np.ndarray, "*shape"]:
    """Part of a file as a read-only array; the mapping ends with the array."""
    if math.prod(shape) == 0:
        return np.zeros(shape, dtype)
    # memmap cannot take a dtype of ml_dtypes on every numpy, hence bytes and a view.
    raw = np.memmap(file, np.uint8, "r", offset, (math.prod(shape) * dtype.itemsize,))
    return np.asarray(raw).view(dtype).reshape(shape)

"""Safetensors files, checked when they are opened and mapped one tensor at a time.

The library checks the header and says what is where. The data is mapped here, because each mapping ends with its tensor
(memory stays at one tensor) and bfloat16 arrives as ml_dtypes'.
"""

from __future__ import annotations

import math
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from safetensors import safe_open

from awq_jax.errors import InputError, reading
from awq_jax.files import inside, read_json, regular
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
    if file := inside(folder, SINGLE):
        return open_shard(file)
    if file := inside(folder, INDEX):
        return open_indexed(file)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1 and (file := inside(folder, files[0].name)):
        return open_shard(file)
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


def open_indexed(index: Path) -> dict[str, StoredTensor]:
    """The tensors that an index names, each in the shard that the index says."""
    folder, found = index.parent, read_json(index)
    with reading(f"{index} is not an index of safetensors files", "download it again"):
        where = {str(name): str(shard) for name, shard in found["weight_map"].items()}
    shards = {shard: inside(folder, shard) for shard in sorted(set(where.values()))}
    missing = [shard for shard, file in shards.items() if file is None]
    if missing:
        raise InputError(
            f"{folder} lacks {missing[0]}, one of {len(missing)} missing of the {len(shards)} shards that {INDEX} "
            "names: finish the download."
        )
    opened = {shard: open_shard(file) for shard, file in shards.items() if file is not None}
    for name, shard in where.items():
        if name not in opened[shard]:
            raise InputError(f"{folder / shard} has no tensor {name}, which {INDEX} places there: download both again.")
    for shard, tensors in opened.items():
        if unnamed := [name for name in tensors if where.get(name) != shard]:
            raise InputError(
                f"{folder / shard} has a tensor {unnamed[0]} that {INDEX} does not name there: download both again."
            )
    return {name: opened[shard][name] for name, shard in where.items()}


def open_shard(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file; nothing but its header is read.

    Raises:
      InputError: what the safetensors library refuses, or a dtype that numpy has no room for.
    """
    with regular(file).open("rb") as f:
        start = f.read(8)
    if start == b"version ":
        raise InputError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder.")
    with reading(f"{file} is cut short or no safetensors file", "download it again"), safe_open(file, "np") as header:
        parts = [(name, header.get_slice(name)) for name in header.offset_keys()]
        entries = [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in parts]
    tensors, at = {}, 8 + int.from_bytes(start, "little")
    # There are neither gaps nor overlaps.
    for name, shape, kind in entries:
        if kind not in DTYPES:
            raise InputError(
                f"{file}: {name} is stored as {kind}, which is not supported: convert the model to bfloat16, float16 "
                "or float32 first."
            )
        tensors[name] = stored(file, at, shape, DTYPES[kind])
        at += tensors[name].nbytes
    return tensors


def stored(file: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> StoredTensor:
    """The tensor that starts at byte `offset` of a file."""
    nbytes = math.prod(shape) * dtype.itemsize
    return StoredTensor(shape, nbytes, lambda: mapped(file, offset, shape, dtype), dtype.name, dtype)


def mapped(file: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Shaped[np.ndarray, "*shape"]:
    """Part of a file as a read-only array; the mapping ends with the array."""
    if math.prod(shape) == 0:
        return np.zeros(shape, dtype)
    # memmap cannot take a dtype of ml_dtypes on every numpy, hence bytes and a view.
    raw = np.memmap(file, np.uint8, "r", offset, (math.prod(shape) * dtype.itemsize,))
    return np.asarray(raw).view(dtype).reshape(shape)

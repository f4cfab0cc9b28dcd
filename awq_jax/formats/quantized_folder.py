"""Folders whose weights are quantized, in any of codecs' formats, read under the names that the dense tensors had."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from awq_jax.errors import InputError, reading
from awq_jax.formats.codecs import READ, Codec, Codes, tensor_of
from awq_jax.formats.codecs.codec import Specs, groups_of
from awq_jax.formats.codecs.codes import apart
from awq_jax.formats.declared import WIDTHS, declaration, foreign, layouts
from awq_jax.formats.stored import StoredTensor
from awq_jax.weights.spec import QuantSpec

EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)$")
"""Modules whose rows are picked: their weights are read dense."""
AGAIN = "download config.json and weights again"


def read_declared(folder: Path, config: Mapping[str, Any]) -> tuple[Codec, Specs] | None:
    """(format, how each module is quantized in it) of a folder, None for a dense one.

    Raises:
      InputError: the folder is quantized in a way that no codec reads, or a field cannot be.
    """
    declared = declaration(folder, config)
    if declared is None:
        return None
    tool, found = declared
    codec = READ.get((tool, *layouts(tool, found)))
    if codec is None:
        raise foreign(folder, tool, found)
    if any(type(found.get(key)) is int and found[key] not in codec.holds.bits for key in WIDTHS):
        raise foreign(folder, tool, found)
    try:
        return codec, codec.read_config(found)
    except InputError as e:
        raise InputError(f"{folder}: its {e}") from e


def quantized_tensors(
    folder: Path, stored: Mapping[str, StoredTensor], codec: Codec, specs: Specs
) -> dict[str, StoredTensor]:
    """The tensors of a quantized folder under the names that the dense ones had: X.qweight and its like as X.weight.

    Raises:
      InputError: one of the parts is missing, their shapes do not fit, or the dense tensor is there too.
    """
    first = next(iter(codec.parts))
    modules = [name.removesuffix(f".{first}") for name in stored if name.endswith(f".{first}")]
    theirs = {f"{module}.{part}" for module in modules for part in codec.parts}
    tensors = {name: tensor for name, tensor in stored.items() if name not in theirs}
    for module in modules:
        spec = specs(module)
        if spec.bits not in codec.holds.bits:
            raise InputError(f"{folder}: {module} has {spec.bits} bits, which {codec.title} files are not read in.")
        absent = {*codec.optional, *(codec.if_asymmetric if spec.symmetric else ())}
        parts = {part: stored[f"{module}.{part}"] for part in codec.parts if f"{module}.{part}" in stored}
        if missing := [part for part in codec.parts if part not in parts and part not in absent]:
            raise InputError(f"{folder} has {module}.{first} but no {module}.{missing[0]}: download it again.")
        if f"{module}.weight" in tensors:
            raise InputError(
                f"{folder} has {module} twice, as {module}.weight and quantized: remove the one that is not its own."
            )
        tensors[f"{module}.weight"] = quantized_tensor(f"{folder}: {module}", parts, codec, spec)
    return tensors


def quantized_tensor(where: str, parts: Mapping[str, StoredTensor], codec: Codec, spec: QuantSpec) -> StoredTensor:
    """The parts of a linear as one tensor."""
    for part, tensor in parts.items():
        if not jnp.issubdtype(tensor.dtype, codec.parts[part]):
            raise InputError(f"{where} cannot be read ({differs(part, tensor, codec)}): download it again.")
    shape = check_shapes(where, parts, codec, spec)

    def codes() -> Codes:
        with reading(f"{where} cannot be read", "download it again"):
            return codec.decode({part: tensor.read() for part, tensor in parts.items()}, spec)

    dtype = next(tensor.dtype for part, tensor in parts.items() if codec.parts[part] is np.floating)
    nbytes, stored_as = sum(part.nbytes for part in parts.values()), f"{spec.bits}-bit g{spec.group_size}"
    picked = bool(EMBEDDING.search(where))
    if picked or lies_apart(parts, spec):
        dense = lambda: np.ascontiguousarray(codes().dense().astype(dtype).swapaxes(-1, -2))
        turned = (*shape[:-2], shape[-1], shape[-2])
        return StoredTensor(turned, nbytes, dense, stored_as, dtype, None, codes, spec, picked)
    return StoredTensor(shape, nbytes, lambda: tensor_of(codes(), dtype), stored_as, dtype, spec, codes, spec)


def differs(part: str, tensor: StoredTensor, codec: Codec) -> str:
    """What is wrong with the type of a part."""
    if codec.parts[part] is np.floating:
        return f"{part} are {tensor.dtype}, not floating point"
    return f"{part} is {tensor.dtype}, not {codec.parts[part].__name__}"


def check_shapes(where: str, parts: Mapping[str, StoredTensor], codec: Codec, spec: QuantSpec) -> tuple[int, ...]:
    """(*lead, i, o) of a weight whose parts fit each other."""
    found = {part: tensor.shape for part, tensor in parts.items()}
    try:
        shape = codec.size(found, spec)
        needed = codec.shapes(shape, spec)
    except (ValueError, IndexError):
        shape, needed = (0, 0), {}
    if 0 in shape or spec.padding(shape[-2]) or any(found[part] != needed[part] for part in parts):
        shown = lambda of: " and ".join(f"{part} {shape}" for part, shape in of.items())
        wanted = {part: needed[part] for part in list(found)[1:] if part in needed}
        raise InputError(
            f"{where}: {', '.join(f'{part} {shape}' for part, shape in found.items())} do not fit config.json's "
            f"group_size={spec.group_size}{f', which needs {shown(wanted)}' if wanted else ''}: {AGAIN}."
        )
    return shape


def lies_apart(parts: Mapping[str, StoredTensor], spec: QuantSpec) -> bool:
    """Whether rows of a group lie apart, which no QuantizedTensor has."""
    part = next((part for part in parts if part.endswith("g_idx")), None)
    if part is None:
        return False
    rows = parts[part].read()
    return apart(rows, len(rows), groups_of(len(rows), spec)) is not None

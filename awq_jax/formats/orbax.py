"""awq_jax's own folder, which holds any params: all bits, padding, input scales, other models than Hugging Face's.

config.json and the tokenizer as the source had them; awq_jax.json, with what is static of each QuantizedTensor; and
params/<part>, one orbax checkpoint of plain arrays for each part, so that a model is written and read in parts.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import absl.logging
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from awq_jax.errors import InputError, reading
from awq_jax.files import inside, read_json
from awq_jax.formats import zarr
from awq_jax.formats.huggingface import Source, write_about, write_json
from awq_jax.formats.leaves import check_leaves
from awq_jax.formats.scratch import scratch_folder
from awq_jax.formats.written import size_of, written_whole
from awq_jax.memory import nbytes_of
from awq_jax.text import unprinted
from awq_jax.weights.paths import named_leaves
from awq_jax.weights.sharding import placed_like
from awq_jax.weights.tensor import QuantizedTensor, in_rows, is_quantized, static_fields, static_json

METADATA = "awq_jax.json"
PARAMS = "params"
VERSION = 1
NAME_MAX = 255
"""Bytes of a file's name on all common file systems."""
PLAIN = re.compile(r"[\w ./-]*")
"""Paths that tensorstore takes as they are."""
LOOPS = threading.RLock()
"""Held while event loops are made in another way."""
LEAVES = ("codes", "scales", "zeros", "input_scale")
AT_ONCE = 1 << 28
"""Bytes that are read before they are placed; one param may have more."""


class Writer:
    """Writes params to a folder, one part a call.

    Example:
      >>> with written_whole("out") as folder:
      ...     writer = Writer(folder, checkpoint, recipe)
      ...     writer.write("embed", embed)
      ...     writer.write("layers_0", layer)
      ...     writer.finish()

    Args:
      folder: exists and is empty.
      source: the dense model, usually a Checkpoint: its config.json, tokenizer and generation_config.json go along;
        None for params that are no model's.
      recipe: how the params came about; its repr is kept.
    """

    def __init__(self, folder: Path, source: Source | None, recipe: Any = None) -> None:
        self.folder, self.source, self.recipe = Path(folder).resolve(), source, recipe
        self.parts: dict[str, int] = {}
        self.tensors: dict[str, Any] = {}
        with plainly_named(self.folder):
            pass  # Refused here, before any work.

    def write(self, part: str, params: Mapping[str, Any]) -> None:
        """Writes a part.

        Args:
          part: its name, "layers_0"; the key under which `load` gives it back.
          params: nested dict of arrays and QuantizedTensors; keys are strings without "/".
        """
        import orbax.checkpoint as ocp

        plain = self._plain(part, params)
        (self.folder / PARAMS / part).mkdir(parents=True)
        # Without OCDBT, whose files have random names, and a Checkpointer, which adds the time of day, the same params
        # are the same bytes. But then the name of a leaf is that of a folder.
        longest = max((len(name.replace("/", ".")) for name in named_leaves(plain)), default=0)
        with (
            plainly_named(self.folder) as folder,
            quiet(),
            closing(ocp.PyTreeCheckpointHandler(use_ocdbt=longest > NAME_MAX)) as handler,
        ):
            # Typed as a path of etils, but any will do.
            target: Any = folder / PARAMS / part
            handler.save(target, args=ocp.args.PyTreeSave(plain))
            handler.finalize(target)
        self.parts[part] = sum(leaf.nbytes for leaf in jax.tree.leaves(plain))

    def finish(self) -> None:
        """Writes awq_jax.json, config.json and what comes from the source, and reads the smallest part back.

        Raises:
          InputError: what was written cannot be read.
        """
        if self.source is not None:
            write_about(self.folder, self.source)
        about = {
            "version": VERSION,
            "recipe": shown(self.recipe),
            "parts": list(self.parts),
            "tensors": self.tensors,
        }
        write_json(self.folder / METADATA, about)
        if self.parts:
            load_part(self.folder, min(self.parts, key=lambda part: self.parts[part]), about)

    def _plain(self, path: str, node: Any) -> Any:
        if isinstance(node, QuantizedTensor):
            node = in_rows(node)
            self.tensors[path] = static_json(node)
            leaves = {name: getattr(node, name) for name in LEAVES}
            return {name: np.asarray(leaf) for name, leaf in leaves.items() if leaf is not None}
        if isinstance(node, Mapping):
            return {quoted(key): self._plain(f"{path}/{key}", child) for key, child in node.items()}
        if not isinstance(node, np.ndarray | jax.Array):
            raise ValueError(f"{path} is a {type(node).__name__}: give nested dicts of arrays and QuantizedTensors.")
        return np.asarray(node)


def save_params(folder: str | Path, params: Any, *, overwrite: bool = False) -> None:
    """Writes params of any function, whole or not at all; `load_params` reads them without being told their structure.

    Args:
      params: any pytree of arrays and QuantizedTensors that is more than one leaf; None in it is no param.
      overwrite: replace a folder that this function wrote.

    Raises:
      FileExistsError: the folder holds something and `overwrite` is not set, or a file that no earlier call wrote.
      InputError: it is or contains the working directory or the home folder; what was written cannot be read.
      ValueError: a leaf that is neither array nor QuantizedTensor, two of one path, one alone, or one that is the path
        of others; names its path.
    """
    if not (leaves := named_leaves(params)):
        raise ValueError(f"params are {params!r}, without an array in it: nothing to save.")
    if "" in leaves:
        raise ValueError("params are one leaf: give it a name, {'kernel': params} say.")
    above = {name[:k] for name in leaves for k, letter in enumerate(name) if letter == "/"}
    if both := sorted(above & leaves.keys()):
        raise ValueError(f"{both[0]!r} is a param, and the path of others: rename one.")
    with written_whole(folder, overwrite=overwrite) as scratch:
        writer = Writer(scratch, None)
        writer.write(PARAMS, unflatten_dict(leaves, sep="/"))
        writer.finish()


def load_params(folder: str | Path, like: Any = None) -> Any:
    """What `save_params` wrote; leaves are numpy arrays where `like` does not place them.

    Args:
      like: params of the structure to give back, dense or not; their leaves may be shapes. Without, nested dicts: a
        list comes back as {"0": ..., "1": ...}, a box as what is in it, and a key with slashes as one dict for each.
        Leaves with a NamedSharding (arrays, or jax.ShapeDtypeStructs of the dense params) place what is loaded: each
        device gets its shard, of a QuantizedTensor too where its groups allow (see `partition_specs`).

    Raises:
      InputError: no such folder, one that a newer awq_jax wrote, or a damaged one; other params than in `like`.

    Example:
      >>> params, adapter = awq.load_params("folder", like=(params, adapter))
      >>> shape = lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
      >>> params = awq.load_params("folder", like=jax.tree.map(shape, jax.eval_shape(init), specs))
    """
    if like is None:
        return load_part(folder, PARAMS)
    with opened(folder, PARAMS) as (part, tensors):
        raw = headers(part)
        leaves, wanted = named_leaves(rebuilt(PARAMS, raw, tensors)), named_leaves(like)
        refuse_others(folder, leaves, wanted)
        placed: dict[str, Any] = {}
        for some in pieces(raw, tensors):
            found = named_leaves(rebuilt(PARAMS, restored(part, some), tensors))
            placed |= {name: placed_like(leaf, wanted[name]) for name, leaf in found.items()}
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf=is_quantized), [placed[name] for name in wanted])


def refuse_others(folder: str | Path, leaves: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse params of a folder that are not those `wanted`."""
    odd = [f"{name} is missing" for name in wanted.keys() - leaves.keys()]
    odd += [f"{name} is not among yours" for name in leaves.keys() - wanted.keys()]
    odd += [
        f"{name} has shape {np.shape(leaves[name])}, yours {np.shape(wanted[name])}"
        for name in leaves.keys() & wanted.keys()
        if np.shape(leaves[name]) != np.shape(wanted[name])
    ]
    if odd:
        raise InputError(
            f"{folder} holds other params: {', '.join(sorted(odd)[:4])}. Give as `like` those that were quantized."
        )


def pieces(raw: Mapping[str, Any], tensors: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """`headers` in pieces of AT_ONCE bytes, each a tree like the whole; no QuantizedTensor is in two."""
    params: dict[str, dict[tuple[str, ...], Any]] = {}
    for path, leaf in flatten_dict(raw).items():
        above = "/".join((PARAMS, *map(unquoted, path[:-1])))
        params.setdefault(above if above in tensors else f"{above}/{unquoted(path[-1])}", {})[path] = leaf
    size, piece = 0, {}
    for leaves in params.values():
        if size >= AT_ONCE:
            yield unflatten_dict(piece)
            size, piece = 0, {}
        size, piece = size + nbytes_of(leaves.values()), piece | leaves
    yield unflatten_dict(piece)


def is_own(folder: Path) -> bool:
    """Whether `Writer` wrote this folder."""
    return (folder / METADATA).exists()


def nbytes(folder: Path) -> int:
    """What the params take on disk."""
    return size_of(folder / PARAMS)


def load(folder: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """({part: params}, metadata) of a folder that `Writer` wrote; leaves are numpy arrays.

    Metadata has "version", "recipe" (its repr), "parts" and "tensors".

    Raises:
      InputError: no such folder, one that a newer awq_jax wrote, or a damaged part.
    """
    about = read_metadata(Path(folder))
    return {part: load_part(folder, part, about) for part in about["parts"]}, about


def load_part(folder: str | Path, part: str, metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One part; see `load`, whose metadata saves reading it anew."""
    with opened(folder, part, metadata) as (where, tensors):
        return rebuilt(part, restored(where), tensors)


@contextmanager
def opened(
    folder: str | Path, part: str, metadata: Mapping[str, Any] | None = None
) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """(the folder of a part for orbax to read, "tensors" of the metadata); what is raised in the block says where."""
    folder = Path(folder).resolve()
    about = read_metadata(folder) if metadata is None else metadata
    if part not in about["parts"]:
        raise InputError(f"{folder} has no part {part!r}; it has {about['parts']}.")
    with reading(f"{folder / PARAMS / part} is damaged", "write or download it again"):
        check_files(folder, part)
        with unprinted(), plainly_named(folder) as plain:
            yield plain / PARAMS / part, about["tensors"]


def check_files(folder: Path, part: str) -> None:
    """Refuse a part with something else than files of the folder, which might lead out of it or block who reads it, and
    arrays whose headers ask for more than there is.
    """
    for file in (folder / PARAMS / part).rglob("*"):
        if file.is_symlink() or not file.is_dir():
            inside(folder, str(file.relative_to(folder)))
    for header in (folder / PARAMS / part).rglob(zarr.HEADER):
        zarr.check_array(header.parent)


def restored(part: Path, like: Any = None) -> Any:
    """The arrays that orbax reads from the folder of a part; all, or those of a tree like a piece of `headers`."""
    import orbax.checkpoint as ocp
    from etils import epath

    with loops_that_may_close(), closing(ocp.PyTreeCheckpointHandler()) as handler:
        return handler.restore(epath.Path(part), args=ocp.args.PyTreeRestore(like, partial_restore=like is not None))


@contextmanager
def loops_that_may_close() -> Iterator[None]:
    """Event loops made meanwhile take no offence at answers after their end.

    Where one array is damaged orbax waits for no other, and tensorstore's threads print what a closed loop raises.
    """
    modules: tuple[Any, ...] = (asyncio, asyncio.events)
    make = asyncio.new_event_loop

    def new_event_loop() -> asyncio.AbstractEventLoop:
        loop = make()
        answer = loop.call_soon_threadsafe

        def answer_while_open(*args: Any, **options: Any) -> Any:
            try:
                return answer(*args, **options)
            except RuntimeError:
                if not loop.is_closed():
                    raise

        vars(loop)["call_soon_threadsafe"] = answer_while_open
        return loop

    with LOOPS:
        for module in modules:
            module.new_event_loop = new_event_loop
        try:
            yield
        finally:
            for module in modules:
                module.new_event_loop = make


def headers(part: Path) -> Any:
    """What `restored` would give, as jax.ShapeDtypeStructs."""
    import orbax.checkpoint as ocp
    from etils import epath

    with loops_that_may_close(), closing(ocp.PyTreeCheckpointHandler()) as handler:
        tree = handler.metadata(epath.Path(part)).tree
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def shapes(folder: Path) -> dict[str, Any]:
    """Every param by its path, from headers alone: a jax.ShapeDtypeStruct, or a QuantizedTensor of them.

    Raises:
      InputError: see `load`.
    """
    about = read_metadata(Path(folder).resolve())
    found: dict[str, Any] = {}
    for part in about["parts"]:
        with opened(folder, part, about) as (where, tensors):
            params = rebuilt(part, headers(where), tensors)
        found |= {f"{part}/{name}": leaf for name, leaf in named_leaves(params).items()}
    return {name.removeprefix("outer/"): found[name] for name in sorted(found, key=place)}


def place(name: str) -> list[Any]:
    """By which names are sorted: numbers in them by their value."""
    return [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", name)]


def read_metadata(folder: Path) -> dict[str, Any]:
    file = inside(folder, METADATA)
    if file is None:
        raise InputError(f"{folder} has no {METADATA}: awq_jax did not write it, or writing it was cut short.")
    about = read_json(file)
    version = about.get("version")
    if isinstance(version, int) and version > VERSION:
        raise InputError(f"{folder} has version {version} of awq_jax's format, this awq_jax reads {VERSION}: upgrade.")
    if version != VERSION:
        raise InputError(f"{file}: version is {version!r}, not {VERSION}: write or download it again.")
    parts, tensors = about.get("parts"), about.get("tensors")
    if not (isinstance(parts, list) and all(map(is_name, parts)) and isinstance(tensors, dict)):
        raise InputError(f"{file} lacks its parts or tensors: write or download it again.")
    return about


def is_name(part: Any) -> bool:
    """Whether this names a folder, rather than a way to one."""
    return isinstance(part, str) and Path(part).name == part


def rebuilt(path: str, node: Any, tensors: Mapping[str, Any]) -> Any:
    """The inverse of what `Writer` does to params; ValueError where leaves do not fit each other."""
    if path in tensors:
        if not isinstance(node, Mapping) or node.keys() - {*LEAVES}:
            raise ValueError(f"{path} is no quantized weight, though {METADATA} says so")
        w = QuantizedTensor(**{name: node.get(name) for name in LEAVES}, **static_fields(tensors[path]))
        check_leaves(path, w)
        return w
    if isinstance(node, Mapping):
        children = {unquoted(key): child for key, child in node.items()}
        return {key: rebuilt(f"{path}/{key}", child, tensors) for key, child in children.items()}
    return node


def quoted(key: str) -> str:
    """A key without what means something in the path of a leaf, where keys are joined by dots; `unquoted` undoes it."""
    return quote(key, safe=" ", errors="surrogatepass").replace(".", "%2E")


def unquoted(key: str) -> str:
    return unquote(key, errors="surrogatepass")


@contextmanager
def plainly_named(folder: Path) -> Iterator[Path]:
    """`folder`, through a link if its path has what tensorstore takes for a pattern, an escape or a scheme.

    Raises:
      InputError: the path of temporary files has some too.
    """
    if PLAIN.fullmatch(str(folder)):
        yield folder
        return
    with scratch_folder() as scratch:
        if not PLAIN.fullmatch(str(scratch)):
            raise InputError(f"{folder} and {scratch} have signs orbax cannot read: set TMPDIR to another folder.")
        (scratch / "link").symlink_to(folder, target_is_directory=True)
        yield scratch / "link"


@contextmanager
def quiet() -> Iterator[None]:
    """orbax warns of files that it does not merge, which need not be."""
    level = absl.logging.get_verbosity()
    absl.logging.set_verbosity(min(level, absl.logging.ERROR))
    try:
        yield
    finally:
        absl.logging.set_verbosity(level)


def shown(recipe: Any) -> str:
    """The repr without the addresses of functions, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(recipe))

"""A model on disk, whatever its format: config, tensors by Hugging Face name, tokenizer."""

from __future__ import annotations

import difflib
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jaxtyping import Shaped
from numpy import ndarray

from awq_jax.errors import InputError, reading
from awq_jax.files import inside, regular
from awq_jax.formats import huggingface, orbax
from awq_jax.formats.gguf.file import open_gguf
from awq_jax.formats.gguf.tokenizer import gguf_tokenizer
from awq_jax.formats.moves import OLD
from awq_jax.formats.quantized_folder import quantized_tensors, read_declared
from awq_jax.formats.safetensors import open_shards
from awq_jax.formats.scratch import NAMES, scratch_folder
from awq_jax.formats.stored import StoredTensor
from awq_jax.models.family import Family
from awq_jax.models.layer import Config
from awq_jax.near import did_you_mean, names_in
from awq_jax.text import unprinted
from awq_jax.weights.tensor import QuantizedTensor, round_to_nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model on disk. Nothing but headers is read until `read`.

    Args:
      kind: "huggingface", "gguf", the name of a codec, or "orbax", awq_jax's own format: it has no tensors here,
        `params` reads it.
      path: the folder, or the .gguf file.
      config: the content of config.json; for GGUF, what it would be.
      tensors: by Hugging Face parameter name.
      load_tokenizer: see `tokenizer`.
      nbytes: of the weights as stored.
    """

    kind: str
    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    load_tokenizer: Callable[[], PreTrainedTokenizerFast]
    nbytes: int

    @property
    def names(self) -> frozenset[str]:
        """The parameters that `read` gives; a head tied to the embedding is not among them."""
        return frozenset(self.tensors)

    def read(self, name: str) -> Shaped[ndarray, "*shape"] | QuantizedTensor:
        """One parameter, read-only and in no cache: memory holds it for as long as you do.

        Returns:
          An array in Hugging Face orientation ([out, in]) and the stored dtype, float32 from GGUF; or, where a codec
          read it, a QuantizedTensor of shape [in, out].

        Raises:
          InputError: there is no such parameter.
        """
        found = self._find(name)
        with reading(f"{self.path}: {name} cannot be read", "download it again"):
            return found.read()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of what `read(name)` would give."""
        return self._find(name).shape

    def params(self, family: Family, config: Config) -> dict[str, Any]:
        """All params of the model, in JAX's memory.

        Args:
          family, config: see models.for_config.

        Raises:
          InputError: a tensor is missing or damaged.
        """
        with reading(f"{self.path}: its params cannot be read", "download it again"):
            if self.kind == "orbax":
                parts, _ = orbax.load(self.path)
                found = parts.pop("outer", {}) | parts
            else:
                found = family.load(self.read, config)
            return jax.tree.map(jnp.asarray, found)

    def shapes(self, family: Family, config: Config) -> dict[str, Any]:
        """`params`, from headers alone: jax.ShapeDtypeStructs, and QuantizedTensors of them.

        Raises:
          InputError: a tensor is missing, or a header is damaged.
        """
        if self.kind == "orbax":
            return unflatten_dict(orbax.shapes(self.path), sep="/")
        stored = family.stored(config).items()
        return unflatten_dict({path: abstract(s.shape, self._find(s.names[0])) for path, s in stored}, sep="/")

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, with the model's chat template if it has one.

        Raises:
          InputError: there is none, or it cannot be read.
        """
        with reading(f"{self.path}: its tokenizer cannot be read", "download it again"), unprinted():
            return self.load_tokenizer()

    @cached_property
    def tokenizer_files(self) -> list[Path]:
        """The files to copy beside a model that is written; made on first use for GGUF, and kept as long as this is."""
        if self.kind != "gguf":
            return huggingface.tokenizer_files(self.path)
        folder = self._made
        self.tokenizer().save_pretrained(folder)
        # transformers 5 names a class here that version 4, which servers still use, does not have.
        config = huggingface.read_json(folder / "tokenizer_config.json")
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        huggingface.write_json(folder / "tokenizer_config.json", config)
        return huggingface.tokenizer_files(folder)

    @property
    def companions(self) -> list[Path]:
        """tokenizer_files and a generation_config.json that names all `stops`, made where the model has none such."""
        return self.tokenizer_files + ([self._generation] if self._generation else [])

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens that end a text: those of generation_config.json and of config.json.

        Raises:
          InputError: something else than tokens stands there.
        """
        file = self._generation
        found = huggingface.stops(file, huggingface.read_json(file)) if file else []
        return tuple(dict.fromkeys((*found, *huggingface.stops(self.path, self.config))))

    @cached_property
    def _generation(self) -> Path | None:
        known = {key: self.config[key] for key in huggingface.SPECIAL if self.config.get(key) is not None}
        own = None if self.kind == "gguf" else inside(self.path, huggingface.GENERATION_CONFIG)
        found = huggingface.read_json(own) if own else known
        named = huggingface.stops(own or self.path, found)
        more = [token for token in huggingface.stops(self.path, self.config) if token not in named]
        if not more and (own or not found):
            return own
        file = self._made / huggingface.GENERATION_CONFIG
        huggingface.write_json(file, found | ({"eos_token_id": [*named, *more]} if more else {}))
        return file

    @cached_property
    def _made(self) -> Path:
        """A folder for files that the model lacks, there as long as this is."""
        block = scratch_folder()
        weakref.finalize(self, block.__exit__, None, None, None)
        return block.__enter__()

    def _find(self, name: str) -> StoredTensor:
        if name in self.tensors:
            return self.tensors[name]
        if self.kind == "orbax":
            raise InputError(f"{self.path} is an awq_jax folder: its params are read whole, with `params`.")
        near = difflib.get_close_matches(name, self.tensors, n=1)
        raise InputError(
            f"{self.path} has no tensor {name} among its {len(self.tensors)}{f'; near it: {near[0]}' if near else ''}. "
            "Does config.json belong to these weights?"
        )


def abstract(shape: tuple[int, ...], tensor: StoredTensor) -> Any:
    """What becomes of a stored tensor as a param of such a shape, without its numbers."""
    dense = jax.ShapeDtypeStruct(shape, jnp.dtype(tensor.dtype))
    spec = tensor.spec
    return dense if spec is None else jax.eval_shape(lambda w: round_to_nearest(w, spec, steps=dense.dtype), dense)


def open_checkpoint(model: str | Path) -> Checkpoint:
    """A model to read.

    Args:
      model: a folder (Hugging Face safetensors, dense or in a format of `codecs`, or written by awq_jax), a .gguf
        file, or the name of a model on the Hugging Face hub, which is fetched into the user's cache.

    Raises:
      InputError: there is no such model, or it is damaged or in a form that is not read; the message says what to do.

    Example:
      >>> checkpoint = open_checkpoint("HuggingFaceTB/SmolLM2-135M")  # or a folder, or model.gguf
      >>> checkpoint.read("model.norm.weight").shape
      (576,)
    """
    if not str(model):
        raise InputError(
            "The name of the model is empty: give a folder, a .gguf file, or a name on the Hugging Face hub."
        )
    with reading(f"{model} cannot be read", "download it again"):
        path = Path(model).expanduser()
        if path.is_dir():
            return open_folder(path)
        if path.exists():
            return open_file(regular(path))
        near = did_you_mean(path.name, names_in(path.parent))
        if path.is_absolute() or path.suffix == ".gguf" or not HUB_ID.fullmatch(str(model)) or str(model)[0] == ".":
            raise InputError(
                f"{model} does not exist{near}: give a folder with config.json and safetensors, a .gguf file, or the "
                "name of a model on the Hugging Face hub."
            )
        return open_folder(huggingface.download(str(model), near))


def open_folder(folder: Path) -> Checkpoint:
    if cut := next((scratch for scratch in folder.glob(NAMES) if (scratch / OLD).exists()), None):
        raise InputError(
            f"{folder} is half replaced, its old files lie in {cut.name}: the run of awq_jax that wrote here is at it, "
            "or died; any next one with this folder as OUT puts them back first."
        )
    if adapters := [name for name in huggingface.ADAPTER_FILES if inside(folder, name)]:
        raise InputError(
            f"{folder} holds a PEFT adapter ({adapters[0]}), which is not applied here: save what "
            "merge_and_unload() gives, or give a folder without the adapter."
        )
    config = huggingface.read_config(folder)
    load_tokenizer = lambda: huggingface.load_tokenizer(folder)
    if orbax.is_own(folder):
        return Checkpoint("orbax", folder, config, {}, load_tokenizer, orbax.nbytes(folder))
    declared = read_declared(folder, config)
    stored = open_shards(folder)
    nbytes = sum(t.nbytes for t in stored.values())
    if declared is None:
        return Checkpoint("huggingface", folder, config, stored, load_tokenizer, nbytes)
    tensors = quantized_tensors(folder, stored, *declared)
    return Checkpoint(declared[0].name, folder, config, tensors, load_tokenizer, nbytes)


def open_file(file: Path) -> Checkpoint:
    if file.suffix == ".safetensors" or (file.suffix == ".json" and (file.parent / "config.json").exists()):
        raise InputError(f"{file} is one file of a model: give its folder, {file.parent}.")
    found = open_gguf(file)
    nbytes = sum(t.nbytes for t in found.tensors.values())
    return Checkpoint("gguf", file, found.config, found.tensors, lambda: gguf_tokenizer(found.metadata), nbytes)

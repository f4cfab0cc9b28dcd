"""Folders of safetensors with quantized weights, in any of codecs' formats, written a part at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from awq_jax.errors import InputError
from awq_jax.formats.codecs import Codec, Codes, check_fits, codes_of, encoded
from awq_jax.formats.half import as_float16
from awq_jax.formats.huggingface import Source, write_about
from awq_jax.formats.quantized_folder import EMBEDDING
from awq_jax.formats.shard_writer import ShardWriter
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import QuantizedTensor

HEAD = "lm_head"


def to_parts(codec: Codec, w: QuantizedTensor | Codes, name: str = "the weight") -> dict[str, np.ndarray]:
    """The arrays of a format for a weight of shape [in, out]; its steps in 16 bits.

    Args:
      name: for the errors.

    Raises:
      InputError: an input scale, or what else the format cannot hold.
    """
    if isinstance(w, QuantizedTensor):
        if w.input_scale is not None:
            raise InputError(
                f"{name} has an input scale, which {codec.title} files cannot hold: quantize with scales='folded'."
            )
        w = codes_of(w)
    check_fits(codec, name, w.q.shape, w.spec)
    if w.scale.dtype.itemsize > 2:
        w = replace(w, scale=as_float16(f"{name}, its steps", w.scale, codec.title, axis=-2))
    return encoded(codec, w, name)


class Writer:
    """Writes a model to a folder, one part a call, so no more than a part of it is ever in memory.

    Example:
      >>> with written_whole("out") as folder:
      ...     writer = Writer(AUTOAWQ, folder, checkpoint, recipe.spec)
      ...     writer.write("outer", {"model.embed_tokens.weight": embedding, "model.norm.weight": norm})
      ...     writer.write("layers_0", {"model.layers.0.self_attn.q_proj.weight": quantized})
      ...     writer.finish("float16")

    Args:
      codec: the format.
      folder: exists and is empty.
      source: the dense model, usually a Checkpoint: its config.json, tokenizer and generation_config.json go along.
      spec: how weights are quantized, most of them where the format has room for several ways.
      unconverted: modules to name as dense beside those that are.
      half: arrays of floats become float16, as the steps of weights do in any case.
    """

    def __init__(
        self,
        codec: Codec,
        folder: Path,
        source: Source,
        spec: QuantSpec,
        unconverted: Sequence[str] = (),
        *,
        half: bool = True,
    ) -> None:
        self.codec, self.folder, self.source, self.spec = codec, Path(folder), source, spec
        self.unconverted, self.half = unconverted, half
        self.shards = ShardWriter(self.folder)
        self.dense: list[str] = []
        self.specs: dict[str, QuantSpec] = {}

    def write(self, part: str, tensors: Mapping[str, Shaped[Array, "*shape"] | QuantizedTensor | Codes]) -> None:
        """Writes a part, which stays in one file.

        Args:
          part: what it is, for the errors.
          tensors: by Hugging Face name; arrays in Hugging Face orientation ([out, in]), quantized weights [in, out].

        Raises:
          InputError: something that the format cannot hold, see to_parts; a value beyond float16.
        """
        arrays: dict[str, np.ndarray] = {}
        for name, tensor in tensors.items():
            where, module = name if part == name else f"{part}: {name}", name.removesuffix(".weight")
            if isinstance(tensor, QuantizedTensor | Codes):
                self._check(where, module, tensor.spec)
                self.specs[module] = tensor.spec
                arrays |= {f"{module}.{key}": a for key, a in to_parts(self.codec, tensor, where).items()}
            else:
                arrays[name] = self._dense(where, module, np.asarray(tensor))
        self.shards.add(arrays)

    def finish(self, dtype: str | None = "float16") -> None:
        """Writes the index, config.json and what comes from the source; without them the folder is no model.

        Args:
          dtype: in which readers are to compute: "bfloat16" where activations are too large for float16; the tensors
            stay as they are, readers convert them. None for the source's.
        """
        self.shards.finish()
        types = {} if dtype is None else {"torch_dtype": dtype, "dtype": dtype}
        about = self.codec.about(self.specs, list(dict.fromkeys([*self.dense, *self.unconverted])), self.spec)
        write_about(self.folder, self.source, **types, **about)

    def _check(self, where: str, module: str, spec: QuantSpec) -> None:
        found, wanted = (spec.bits, spec.group_size), (self.spec.bits, self.spec.group_size)
        title = self.codec.title
        if found != wanted and not self.codec.holds.mixed:
            raise InputError(
                f"{where}: (bits, group size) is {found} and {wanted} elsewhere, but an {title} file has one of each: "
                "drop the rule that changes them, or write format='orbax'."
            )
        if module == HEAD and not self.codec.holds.head:
            raise InputError(f"{where}: readers of {title} files expect a dense lm_head: exclude it with a rule.")

    def _dense(self, where: str, module: str, array: np.ndarray) -> np.ndarray:
        if array.ndim == 2 and not EMBEDDING.search(module):
            self.dense.append(module)
        if self.half and jnp.issubdtype(array.dtype, jnp.floating):
            array = as_float16(where, array, self.codec.title)
        return np.asarray(array, order="C")

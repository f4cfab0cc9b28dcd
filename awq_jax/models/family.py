"""A family of models: which config.json it reads, and what its tensors are called elsewhere."""

from __future__ import annotations

import functools as ft
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from awq_jax.models.decoder import Block, Decoder, Params, layer_name
from awq_jax.models.fields import Watched
from awq_jax.models.layer import Config, Layer
from awq_jax.models.strict import refuse_unread
from awq_jax.weights.tensor import QuantizedTensor, is_quantized

Read = Callable[[str], np.ndarray | QuantizedTensor]
Shape = tuple[int, ...]

HF: Mapping[str, str] = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
    "attn/q": "self_attn.q_proj",
    "attn/k": "self_attn.k_proj",
    "attn/v": "self_attn.v_proj",
    "attn/o": "self_attn.o_proj",
    "attn/qkv": "self_attn.qkv_proj",
    "attn/q_norm": "self_attn.q_norm",
    "attn/k_norm": "self_attn.k_norm",
    "attn/q_a": "self_attn.q_a_proj",
    "attn/q_a_norm": "self_attn.q_a_layernorm",
    "attn/q_b": "self_attn.q_b_proj",
    "attn/kv_a": "self_attn.kv_a_proj_with_mqa",
    "attn/kv_a_norm": "self_attn.kv_a_layernorm",
    "attn/kv_b": "self_attn.kv_b_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "mlp/gate_up": "mlp.gate_up_proj",
    "mlp/router": "mlp.gate",
    "mlp/correction": "mlp.gate.e_score_correction_bias",
    "mlp/experts/gate": "mlp.experts.{e}.gate_proj",
    "mlp/experts/up": "mlp.experts.{e}.up_proj",
    "mlp/experts/down": "mlp.experts.{e}.down_proj",
    "mlp/shared/gate": "mlp.shared_experts.gate_proj",
    "mlp/shared/up": "mlp.shared_experts.up_proj",
    "mlp/shared/down": "mlp.shared_experts.down_proj",
}
"""Path of a module in the params -> Llama's names in Hugging Face files, and what most call what a Llama lacks."""

GGUF: Mapping[str, str] = {
    "embed": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "attn_norm": "attn_norm",
    "attn/q": "attn_q",
    "attn/k": "attn_k",
    "attn/v": "attn_v",
    "attn/o": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp/gate": "ffn_gate",
    "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
}
"""The same in GGUF files, there behind `blk.{i}.` in a layer."""

SERVED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q", "k", "v"),
    "gate_up_proj": ("gate", "up"),
    "fused_qkv_a_proj": ("q_a", "kv_a"),
    "": ("experts/gate", "experts/up", "experts/down"),
}
"""What servers call the one matrix that they make of several of a module; of experts it has the name of them all."""


@dataclass(frozen=True)
class Stored:
    """A param as files have it: names of one tensor, or of each expert's; the shape of the param."""

    names: tuple[str, ...]
    shape: Shape
    stacked: bool = False

    @property
    def each(self) -> Shape:
        """The shape of what is read of one tensor."""
        return self.shape[1:] if self.stacked else self.shape


@dataclass(frozen=True, eq=False)
class Family:
    """One architecture of Hugging Face, or several that are computed alike.

    Args:
      architectures: their names in config.json.
      read: config.json -> Config; ValueError for what the decoder does not compute.
      names: where they differ from HF, of modules or whole paths of params; "{e}" is the number of an expert.
      layers: what stands before the names in a layer, "{i}" its number.
      ignored: names of tensors that are computed anew instead of read; old checkpoints hold them.
      in_out: matrices of layers are stored as [in, out] (GPT-2's Conv1D).
    """

    architectures: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Config]
    names: Mapping[str, str] = field(default_factory=dict)
    layers: str = "model.layers.{i}."
    ignored: str = r"rotary_emb\.inv_freq$"
    in_out: bool = False

    def config(self, hf: Mapping[str, Any], dtype: Any = jnp.float32) -> Config:
        """The Config of a config.json of transformers 4 or 5, with transformers' defaults for what it leaves out.

        Raises:
          ValueError: a field is missing, of another type or out of range, or says something that is not computed.
        """
        watched = Watched(hf)
        config = self.read(watched)
        refuse_unread(watched)
        return replace(config, dtype=dtype)

    def load(self, read: Read, config: Config) -> dict[str, Any]:
        """All params of a checkpoint.

        Args:
          read: the tensor of a Hugging Face name: an array in HF orientation ([out, in] for matrices), or a
            QuantizedTensor, already [in, out].

        Raises:
          ValueError: a tensor's shape is not what the config asks for.
        """
        return unflatten_dict({path: self.param(read, config, path) for path in self.stored(config)}, sep="/")

    def param(self, read: Read, config: Config, path: str) -> Any:
        """The param of a path, "layers_0/attn/q/kernel"; see `load`."""
        stored = self.stored(config)[path]
        parts = [self._checked(read(name), name, path, stored.each) for name in stored.names]
        if not stored.stacked:
            return parts[0]
        if len({is_quantized(part) for part in parts}) > 1:
            raise ValueError(f"{stored.names[0]} and the other experts are quantized in part: they are one param here.")
        return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)

    def to_names(self, params: Params) -> dict[str, Any]:
        """Params, all or some, by Hugging Face name; dense matrices as [out, in], others as they are."""
        flat: dict[str, Any] = flatten_dict(dict(params), is_leaf=lambda _, v: is_quantized(v), sep="/")
        found = {}
        for path, w in flat.items():
            names, stacked = self._names(path, w.shape)
            parts = [jax.tree.map(lambda a, e=e: a[e], w) for e in range(len(names))] if stacked else [w]
            turned = not is_quantized(w) and self._turned(path)
            found |= {n: part.swapaxes(-2, -1) if turned else part for n, part in zip(names, parts, strict=True)}
        return found

    def stored(self, config: Config) -> Mapping[str, Stored]:
        """Every param by its path, "layers_0/attn/q/kernel"."""
        return _stored(self, config)

    def stored_shapes(self, config: Config) -> dict[str, Shape]:
        """The shape of every tensor that `load` reads, by Hugging Face name; of matrices as they are stored."""
        turn = lambda path, shape: (*shape[:-2], shape[-1], shape[-2]) if self._turned(path) else shape
        return {name: turn(path, s.each) for path, s in self.stored(config).items() for name in s.names}

    def fused(self, config: Config) -> dict[str, tuple[str, ...]]:
        """The Hugging Face name of every matrix that servers make of several -> the paths of these."""
        stored, found = self.stored(config), {}
        for path in stored:
            for name, parts in SERVED.items():
                module = path.removesuffix(f"/{parts[0]}/kernel")
                paths = tuple(f"{module}/{part}/kernel" for part in parts)
                if paths[0] == path and stored.keys() >= set(paths):
                    outer = stored[path].names[0].removesuffix(".weight").rpartition(".")[0]
                    found[outer.rpartition(".")[0] if stored[path].stacked else f"{outer}.{name}"] = paths
        return found

    def named_as(self, names: Collection[str]) -> Family:
        """This family, or where a checkpoint with such names was saved without its head, as gpt2 was, one without what
        stands before all others."""
        first = self.layers.partition(".")[0] + "."
        embedding = self.name_of("embed/embedding")
        if embedding in names or embedding.removeprefix(first) not in names:
            return self
        bare = {path: name.removeprefix(first) for path, name in {**HF, **self.names}.items()}
        return replace(self, names=bare, layers=self.layers.removeprefix(first))

    def name_of(self, path: str) -> str:
        """What the tensor of a param outside of the layers is called."""
        return self._names(path, ())[0][0]

    @property
    def numbers(self) -> str:
        """A regular expression for the number of a layer in names of tensors."""
        return re.escape(self.layers).replace(re.escape("{i}"), r"(\d+)")

    def _checked(self, value: Any, name: str, path: str, shape: Shape) -> Any:
        if is_quantized(value) and not path.endswith("/kernel"):
            raise ValueError(f"{name} is quantized: only matrices of linear layers may be. Dequantize it.")
        value = value.swapaxes(-2, -1) if self._turned(path) and not is_quantized(value) and value.ndim > 1 else value
        if value.shape != shape:
            raise ValueError(
                f"{name}: found shape {value.shape} (as [in, out] if a matrix), the config asks for "
                f"{shape}. Is config.json that of these weights?"
            )
        return value

    def _turned(self, path: str) -> bool:
        """Whether a param is a matrix that files have as [out, in]."""
        return path.endswith("/kernel") and not (self.in_out and path.startswith("layers_"))

    def _names(self, path: str, shape: Shape) -> tuple[tuple[str, ...], bool]:
        """The names of a param's tensors, and whether they are those of experts."""
        number, inside = ("", path) if not path.startswith("layers_") else path[7:].split("/", 1)
        prefix = self.layers.format(i=number) if number else ""
        known = {**HF, **self.names}
        module, _, kind = inside.rpartition("/")
        name = prefix + (known.get(inside) or f"{known[module]}.{'bias' if kind == 'bias' else 'weight'}")
        if "{e}" not in name:
            return (name,), False
        return tuple(name.format(e=e) for e in range(shape[0])), True


@ft.lru_cache(maxsize=16)
def _stored(family: Family, config: Config) -> Mapping[str, Stored]:
    found = {}
    for path, shape in param_shapes(config).items():
        names, stacked = family._names(path, shape)
        found[path] = Stored(names, shape, stacked)
    return found


def param_shapes(config: Config) -> dict[str, Shape]:
    """The shape of every param by its path, "layers_0/attn/q/kernel"."""
    found = dict(_outer_shapes(replace(config, layers=config.layers[:1])))
    for i, layer in enumerate(config.layers):
        found |= {f"{layer_name(i)}/{path}": shape for path, shape in _shapes_of(layer).items()}
    return found


def matrix_shapes(config: Config) -> dict[str, Shape]:
    """[in, out] of every matrix in a layer, [experts, in, out] of theirs, by path, "layers_0/attn/q/kernel"."""
    is_matrix = lambda path: path.startswith("layers_") and path.endswith("/kernel") and not is_router(path)
    return {path: shape for path, shape in param_shapes(config).items() if is_matrix(path)}


def is_router(path: str) -> bool:
    """Whether a matrix chooses or weighs experts: it stays dense, in every tool and server."""
    return path.endswith(("/router/kernel", "/shared_gate/kernel"))


@ft.cache
def _shapes_of(layer: Layer) -> dict[str, Shape]:
    return _shapes(Block(layer), jax.ShapeDtypeStruct((1, 1, layer.width), jnp.float32))


@ft.cache
def _outer_shapes(config: Config) -> dict[str, Shape]:
    found = _shapes(Decoder(config), jax.ShapeDtypeStruct((1, 1), jnp.int32))
    return {path: shape for path, shape in found.items() if not path.startswith("layers_")}


def _shapes(module: Any, x: jax.ShapeDtypeStruct) -> dict[str, Shape]:
    flat: dict[str, Any] = flatten_dict(jax.eval_shape(module.init, jax.random.key(0), x)["params"], sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}

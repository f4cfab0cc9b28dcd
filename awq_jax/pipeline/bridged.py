"""Checkpoints of models that only transformers' own code computes, through awq_jax.torch_bridge."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax import models
from awq_jax.errors import InputError
from awq_jax.formats.checkpoint import Checkpoint
from awq_jax.formats.codecs import Codec, check_fits
from awq_jax.pipeline.bridged_parts import joined, matrix
from awq_jax.torch_bridge.pretrained import Pretrained, pretrained
from awq_jax.tracing.segments import Segments
from awq_jax.tracing.sites import Site
from awq_jax.transforms.recipe import Recipe, some
from awq_jax.transforms.stream import Lazy
from awq_jax.weights.spec import Rule
from awq_jax.weights.tensor import is_quantized

GATE = 32
"""Sites of fewer outputs choose experts or scale one: servers keep them dense."""


@dataclass(frozen=True, eq=False)
class Bridged:
    """A checkpoint and the model that transformers makes of its config.

    Args:
      places: for each param the tensors of the checkpoint that it is made of.
    """

    checkpoint: Checkpoint
    model: Pretrained
    places: Mapping[str, Any]

    def lazy_params(self) -> dict[str, Lazy]:
        """The params by torch's names, read when they are indexed; half precision as float32."""
        from awq_jax.torch_bridge.places import assembled

        def lazy(name: str, shape: tuple[int, ...], dtype: Any) -> Lazy:
            whole = lambda: assembled(self.places[name], shape, self.checkpoint.read)
            return Lazy(shape, dtype, lambda index: np.asarray(whole()[index]).astype(dtype, copy=False))

        return {name: lazy(name, w.shape, w.dtype) for name, w in self.model.params.items()}

    def params(self) -> dict[str, Any]:
        """The params in memory, QuantizedTensors where the checkpoint holds such."""
        dense = self.lazy_params()
        return {name: self._param(name, lazy) for name, lazy in dense.items()}

    def _param(self, name: str, lazy: Lazy) -> Any:
        places, tensors = self.places[name], self.checkpoint.tensors
        if not any(tensors[place.name].quantized for place in places):
            return jnp.asarray(lazy[...])
        found = joined(places, lazy.shape, self.checkpoint.read, transposed=self.model.is_transposed(name))
        return jax.tree.map(jnp.asarray, found)

    def left_over(self) -> list[str]:
        """Tensors of the checkpoint of which no param is made."""
        read = {place.name for parts in self.places.values() for place in parts}
        return [name for name in self.checkpoint.tensors if name not in read]

    def tensors(self, name: str, leaf: Any) -> dict[str, Any]:
        """What became of a param, as the checkpoint's tensors."""
        if is_quantized(leaf):
            return {place.name: matrix(leaf, place) for place in self.places[name]}
        whole = np.ascontiguousarray(leaf)
        return {place.name: place.of(whole) for place in self.places[name]}


def bridged(checkpoint: Checkpoint) -> Bridged:
    """A checkpoint as transformers' own code computes it.

    Raises:
      InputError: torch is missing, transformers does not know the architecture, or the weights are not the config's.
    """
    model = pretrained(checkpoint.path)
    from awq_jax.torch_bridge.places import places

    dense = lambda name, t: t.shape if not t.quantized or model.is_transposed(name) else t.shape[::-1]
    shapes = {name: dense(name, t) for name, t in checkpoint.tensors.items()}
    found = Bridged(checkpoint, model, places(model.model, model.params, shapes))
    if unread := model.read_by_nothing(found.left_over(), ()):
        raise InputError(
            f"{checkpoint.path}: transformers' {model.name} reads nothing of {len(unread)} tensors ({some(unread)}): "
            "does config.json belong to these weights?"
        )
    return found


def sites_of(found: Segments) -> dict[str, Site]:
    """The sites of all segments, by the params' names."""
    return {
        str(param): segment.traced.sites[f"<{k}>"]
        for segment in found.segments
        for k, param in enumerate(segment.params)
        if f"<{k}>" in segment.traced.sites
    }


def for_readers(
    recipe: Recipe, sites: Mapping[str, Site], found: Bridged, codecs: Sequence[Codec]
) -> tuple[Recipe, list[str]]:
    """`recipe` without the sites that readers of quantized files keep dense, and their names.

    Raises:
      InputError: a site that one of the formats cannot hold; says which, and what to do.
    """
    small = [name for name, site in sites.items() if site.out_features < GATE]
    if small:
        recipe = replace(recipe, rules=(*recipe.rules, *(Rule(f"^{re.escape(name)}$", skip=True) for name in small)))
    for name, site in sites.items():
        if (spec := recipe.spec_of(name)) is None or site.kept:
            continue
        for place in found.places[name]:
            if len(place.shape) != 2 or not place.name.endswith(".weight"):
                raise InputError(
                    f"{name}: the checkpoint holds it as {place.name} {place.shape}, and quantized files hold matrices "
                    f"called NAME.weight: leave it dense (--skip {re.escape(name.rsplit('.', 1)[-1])})."
                )
            o = math.prod(place.shape) // site.in_features
            for codec in codecs:
                check_fits(codec, place.name, (site.in_features, o), spec)
    return recipe, small


@dataclass(frozen=True)
class Sizes:
    """What checks of tokens ask of a config."""

    vocab: int
    positions: int | None
    dtype: Any = jnp.float32


def sizes(found: Bridged) -> Sizes:
    model = found.model.model
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Sizes(model.get_input_embeddings().weight.shape[0], trained)


def fallback(checkpoint: Checkpoint) -> Bridged | None:
    """A checkpoint as transformers' code computes it, where none of awq_jax.models does; None where one does.

    Raises:
      InputError: neither does.
    """
    if checkpoint.kind in ("gguf", "orbax"):
        return None
    try:
        models.for_config(checkpoint.config)
    except ValueError as e:
        if not known(checkpoint.config):
            raise InputError(f"{checkpoint.path}: {e}") from e
        return bridged(checkpoint)
    return None


def known(config: Mapping[str, Any]) -> bool:
    """Whether transformers has a model of the architecture that a config.json names."""
    import transformers

    names = config.get("architectures")
    return isinstance(names, list) and any(isinstance(name, str) and hasattr(transformers, name) for name in names)

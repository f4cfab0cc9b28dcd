"""Checkpoints of models that only transformers' own code computes, through awq_jax.torch_bridge."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from awq_jax import models
from awq_jax.errors import InputError
from awq_jax.formats.checkpoint import Checkpoint
from awq_jax.models.family import Family
from awq_jax.models.fields import NotComputed
from awq_jax.models.generate import draw
from awq_jax.pipeline.agreement import refuse_integers, same_values, why
from awq_jax.pipeline.bridged_parts import joined, matrix
from awq_jax.torch_bridge.pretrained import Pretrained, pretrained, reads
from awq_jax.tracing.program import slot
from awq_jax.tracing.segments import Segments
from awq_jax.tracing.sites import Site
from awq_jax.transforms.calibrate import quantized
from awq_jax.transforms.quantize import decide
from awq_jax.transforms.recipe import Recipe
from awq_jax.transforms.stream import Lazy
from awq_jax.weights.spec import Rule
from awq_jax.weights.tensor import is_quantized

LAYERS = re.compile(r"(n|num)_([a-z]+_)?layers?$")
SHARED = 128
"""Layers that may be of fewer tensors, as where all share theirs."""
GATE = 32
"""Sites of fewer outputs choose experts or scale one: servers keep them dense."""


@dataclass(frozen=True, eq=False)
class Bridged:
    """A checkpoint and the model that transformers makes of its config.

    Args:
      places: for each param the tensors of the checkpoint that it is made of.
      why_not_ours: why a family of awq_jax.models that reads such checkpoints does not compute this one.
    """

    checkpoint: Checkpoint
    model: Pretrained
    places: Mapping[str, Any]
    why_not_ours: str = ""

    def __str__(self) -> str:
        """What computes it, and why."""
        because = f"{self.why_not_ours.rstrip('.')}. " if self.why_not_ours else ""
        return f"{because}Computed by transformers' {self.model.name}, traced"

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

    @cached_property
    def logits(self) -> Callable[..., Array]:
        """`(params, tokens) -> logits`, of params that may be quantized; compiled once for each shape."""
        return jax.jit(quantized(self.model.logits))

    @cached_property
    def next(self) -> Callable[..., Array]:
        """`(params, text, end, how) -> token` at position `end`, of which nothing from there on is seen."""
        run = quantized(self.model.logits)
        last = lambda params, text, end: jax.lax.dynamic_index_in_dim(run(params, text), end - 1, 1, keepdims=False)
        return jax.jit(lambda params, text, end, how: draw(last(params, text, end), end, how))

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


def bridged(checkpoint: Checkpoint, why_not_ours: str = "") -> Bridged:
    """A checkpoint as transformers' own code computes it.

    Args:
      why_not_ours: see `Bridged`.

    Raises:
      InputError: torch is missing, transformers does not know the architecture, or the weights are not the config's.
    """
    check_layers(checkpoint)
    model = pretrained(checkpoint.path)
    from awq_jax.torch_bridge.places import places

    dense = lambda name, t: t.shape if not t.quantized or model.is_transposed(name) else t.shape[::-1]
    shapes = {name: dense(name, t) for name, t in checkpoint.tensors.items()}
    found = Bridged(checkpoint, model, places(model.model, model.params, shapes), why_not_ours)
    check_read(found)
    return found


def check_layers(checkpoint: Checkpoint) -> None:
    """Refuse more layers than tensors are of, before anything is made of so many."""
    numbers = (int(part) for name in checkpoint.tensors for part in name.split(".") if part.isdecimal())
    held = max(numbers, default=0) + 1
    for field, count in checkpoint.config.items():
        if LAYERS.match(field) and isinstance(count, int) and count > max(held, SHARED):
            raise InputError(
                f"{checkpoint.path}: config.json has {field}={count}, and the tensors are of {held} layers."
            )


def check_read(found: Bridged) -> None:
    """Passes if all of a checkpoint's tensors are read, as what they are, or hold again what is tied to a param.

    Raises:
      InputError: names one that is not, with the likely cause and what to do.
    """
    checkpoint, model, left_over = found.checkpoint, found.model, found.left_over()
    ties = {name: found.places[param] for name, param in model.ties.items() if name in left_over}
    for name, parts in ties.items():
        if len(parts) != 1 or not same_values(checkpoint, name, parts[0].name):
            raise InputError(
                f"{checkpoint.path}: {name} has other values than {parts[0].name}, to which the config ties it: set "
                "tie_word_embeddings to false to use it, or remove it."
            )
    if unread := model.read_by_nothing(left_over, ties):
        raise InputError(f"{checkpoint.path}: transformers' {model.name} reads nothing of {why(unread)}.")
    floats = [name for name, w in model.params.items() if jnp.issubdtype(w.dtype, jnp.floating)]
    refuse_integers(checkpoint, [place.name for name in floats for place in found.places[name]])


def sites_of(found: Segments) -> dict[str, Site]:
    """The sites of all segments, by the params' names."""
    return {
        str(param): replace(segment.traced.sites[slot(k)], name=str(param))
        for segment in found.segments
        for k, param in enumerate(segment.params)
        if slot(k) in segment.traced.sites
    }


def gates_skipped(recipe: Recipe, sites: Mapping[str, Site]) -> tuple[Recipe, list[str]]:
    """`recipe` without the sites of few outputs, and their names."""
    small = [name for name, site in sites.items() if site.out_features < GATE]
    rules = (Rule(f"^({'|'.join(map(re.escape, small))})$", skip=True),) if small else ()
    return replace(recipe, rules=(*recipe.rules, *rules)), small


def matrices(found: Bridged, sites: Mapping[str, Site], recipe: Recipe) -> dict[str, tuple[int, int]]:
    """(in, out) of the matrices that files hold of each site that is quantized; of several, what divides all outs.

    Raises:
      InputError: files hold a site as something else; says what to do.
    """
    shapes = {}
    for name, site in sites.items():
        if decide(site, recipe)[0] is None:
            continue
        for place in found.places[name]:
            if len(place.shape) != 2 or not place.name.endswith(".weight"):
                raise InputError(
                    f"{name}: the checkpoint holds it as {place.name} {place.shape}, and quantized files hold matrices "
                    f"called NAME.weight: leave it dense (--skip {re.escape(name.rsplit('.', 1)[-1])})."
                )
        outs = (math.prod(place.shape) // site.in_features for place in found.places[name])
        shapes[name] = (site.in_features, math.gcd(*outs))
    return shapes


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


def no_own_text() -> InputError:
    """The error for calibration on what the model writes."""
    return InputError("calib='self': a model that transformers' code computes writes no text of its own: give a text.")


def fallback(checkpoint: Checkpoint) -> Bridged | None:
    """A checkpoint as transformers' code computes it, where none of awq_jax.models does; None where one does.

    Raises:
      InputError: neither does.
    """
    if checkpoint.kind in ("gguf", "orbax"):
        return None
    try:
        family = models.for_config(checkpoint.config)
    except ValueError as e:
        if not known(checkpoint.config):
            raise InputError(f"{checkpoint.path}: {e}") from e
        return bridged(checkpoint)
    if not (missing := uncomputed(family, checkpoint.config)):
        return None  # What no one computes is refused where ours is asked for.
    try:
        unread = [e for e in missing if not reads(checkpoint.config, e.field)]
        if not unread:
            return bridged(checkpoint, str(missing[0]))
    except InputError as other:
        reason = str(missing[0]).rstrip(".")
        raise InputError(f"{checkpoint.path}: {reason}, and transformers' code is no way out: {other}") from other
    raise InputError(f"{checkpoint.path}: {unread[0]}") from unread[0]


def uncomputed(family: Family, config: Mapping[str, Any]) -> list[NotComputed]:
    """What our decoder does not compute of a config, a field after the other."""
    found: list[NotComputed] = []
    while True:
        try:
            family.config(config)
        except NotComputed as e:
            found.append(e)
            if e.field not in config:
                return found
            config = {field: value for field, value in config.items() if field != e.field}
        except ValueError:
            return found
        else:
            return found


def known(config: Mapping[str, Any]) -> bool:
    """Whether transformers has a model of the architecture that a config.json names."""
    import transformers

    names = config.get("architectures")
    return isinstance(names, list) and any(isinstance(name, str) and hasattr(transformers, name) for name in names)

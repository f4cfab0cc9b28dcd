"""Models of transformers by their config.json alone: functions of params that are read later."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from awq_jax.errors import InputError, reading
from awq_jax.text import unprinted
from awq_jax.torch_bridge.from_torch import required, stored, untraced

OUTPUTS = ("last_hidden_state", "logits")
"""What the inner model gives: hidden states, or logits where there is no inner one."""
LEFT_OVER = r"rotary_emb\.inv_freq$|\.attn\.(bias|masked_bias)$|\.attention\.(bias|masked_bias)$|position_ids$"
"""Tensors of old checkpoints that code computes by itself today."""
TOKENS = jax.ShapeDtypeStruct((1, 1), jnp.int32)
"""Of what kind the models' inputs are."""


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A model of transformers without weights.

    Args:
      model: its params are on the meta device.
      params: the shapes of its params, by torch's names.
    """

    model: Any
    params: Mapping[str, jax.ShapeDtypeStruct]

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def inner(self) -> Any:
        """The model without its head."""
        return getattr(self.model, self.model.base_model_prefix, self.model)

    @cached_property
    def _transposed(self) -> frozenset[str]:
        prefix = f"{self.model.base_model_prefix}."
        found = [name for name, module in self.model.named_modules() if type(module).__name__ == "Conv1D"]
        return frozenset(f"{name}.weight" for full in found for name in (full, full.removeprefix(prefix)))

    def is_transposed(self, name: str) -> bool:
        """Whether a param is a matrix (in, out), as GPT-2's are, in the place of torch's (out, in)."""
        return name in self._transposed

    @cached_property
    def ties(self) -> Mapping[str, str]:
        """The names in torch's state_dict of what is a param by another name, and that."""
        names, _ = stored(self.model)
        return {name: param for name, param in names.items() if name != param}

    @cached_property
    def hidden(self) -> Callable[[Mapping[str, Array], Array], Array]:
        """`(params, tokens) -> hidden states`, traced once for each shape of tokens, when they come."""
        inner = self.inner
        fn, own, _ = untraced(inner, TOKENS)
        prefix = "" if inner is self.model else f"{self.model.base_model_prefix}."
        whole = {name: self.ties.get(prefix + name, prefix + name) for name in own}

        def hidden(params: Mapping[str, Array], tokens: Array) -> Array:
            out = fn({name: params[full] for name, full in whole.items()}, tokens)
            return next(out[key] for key in OUTPUTS if key in out)

        return hidden

    @cached_property
    def logits(self) -> Callable[[Mapping[str, Array], Array], Array]:
        """`(params, tokens) -> logits`; see `hidden`."""
        fn, _, _ = untraced(self.model, TOKENS)

        def logits(params: Mapping[str, Array], tokens: Array) -> Array:
            out = fn(params, tokens)
            if "logits" not in out:
                raise InputError(f"{self.name} gives {', '.join(out)} and no logits: give a model with a head.")
            return out["logits"]

        return logits

    def read_by_nothing(self, tensors: Iterable[str], read: Iterable[str]) -> list[str]:
        """Of a checkpoint's tensors those that no param comes from and that are not known to be left over."""
        known = [LEFT_OVER, *(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ())]
        unread = sorted(set(tensors) - set(read))
        return [name for name in unread if not any(re.search(pattern, name) for pattern in known)]


def pretrained(folder: Path) -> Pretrained:
    """The model that a folder's config.json describes; code in the folder is not run.

    Raises:
      InputError: torch is missing; transformers does not know the architecture, or makes no model of the config.
    """
    required()
    import transformers
    from transformers.initialization import no_init_weights

    from awq_jax.torch_bridge.meta import without_weights

    what, remedy = f"{folder}: transformers makes no model of config.json", "give a config of a model that it knows"
    with reading(what, remedy), unprinted():
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        named = next(iter(config.architectures or ()), None)
        kind = getattr(transformers, str(named), None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise InputError(
                f"{folder}: architectures={config.architectures} names no model of transformers "
                f"{transformers.__version__}, and code in the folder is not run: upgrade transformers, or quantize the "
                "model as a function of yours (awq.quantize)."
            )
        if config.is_encoder_decoder:
            raise InputError(
                f"{folder}: {named} reads more than tokens: trace it with awq.from_torch, and quantize what that gives."
            )
        vars(config).pop("quantization_config", None)
        config._attn_implementation = "eager"
        with without_weights(), no_init_weights():
            model = kind(config).eval()
            model.tie_weights()
    _, params = stored(model)
    return Pretrained(model, {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in params.items()})


def reads(config: Mapping[str, Any], field: str) -> bool:
    """Whether transformers' code of the architecture that a config.json names looks at a field of it.

    Raises:
      InputError: torch is missing.
    """
    required()
    import transformers

    kind = getattr(transformers, str(next(iter(config.get("architectures") or ()), None)), None)
    module = sys.modules.get(getattr(kind, "__module__", ""))
    return module is not None and bool(re.search(rf"config\.{field}\b|[\"']{field}[\"']", inspect.getsource(module)))

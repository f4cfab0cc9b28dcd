"""Models that transformers' own code computes, in memory: scores, and text without a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from awq_jax.errors import InputError
from awq_jax.memory import matmul_bytes, to_be_read
from awq_jax.models.generate import NO_TOKEN, ROUNDED, Speed, draw, no_numbers, sampling
from awq_jax.models.inputs import check_tokens, without_rows
from awq_jax.models.pieces import pieces
from awq_jax.pipeline.bridged import Bridged, sizes
from awq_jax.pipeline.load import Model, key_of
from awq_jax.transforms.calibrate import quantized


@dataclass(frozen=True, eq=False)
class BridgedModel(Model):
    """A Model of which `family` is a Bridged and `config` its Sizes; params by torch's names."""

    family: Any
    config: Any

    @cached_property
    def _logits(self) -> Callable[..., Array]:
        return jax.jit(quantized(self.family.model.logits((1, ROUNDED))))

    def logits(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        """Logits of every position, float32; traced and compiled once for each shape."""
        check_tokens(self.config, tokens, "tokens")
        return self._logits(self.params, jnp.asarray(tokens, jnp.int32)).astype(jnp.float32)

    def hidden(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t h"]:
        raise NotImplementedError("a model of transformers' code gives logits alone")

    def nbytes_of_logits(self, tokens: int) -> int:
        given = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        logits = jax.eval_shape(self._logits, self.params, given)
        return to_be_read(self.params) + matmul_bytes(self._logits, self.params, given) + 3 * 4 * logits.size

    def stream(
        self,
        prompt: str | Int[Array | np.ndarray, " t"],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        chat: bool = True,
        seed: int = 0,
        speed: Speed | None = None,
    ) -> Iterator[str]:
        """See `Model.stream`; without a cache, so that each token computes all before it anew."""
        if not self.family.model.model.can_generate():
            raise InputError(f"{self.family.model.name} writes no text: it predicts no next token.")
        tokens = self.tokens_of(prompt, chat=chat) if isinstance(prompt, str) else np.asarray(prompt)
        check_tokens(self.config, tokens, "the prompt")
        how = sampling(self.config, len(tokens), max_new_tokens, temperature, key_of(seed), top_p)
        return pieces(self.tokenizer, self._tokens(tokens, max_new_tokens, how))

    def _tokens(self, tokens: Int[np.ndarray, " t"], most: int, how: Any) -> Iterator[int]:
        length = -(-(len(tokens) + most) // ROUNDED) * ROUNDED
        text = np.zeros((1, min(length, self.config.positions or length)), np.int32)
        text[0, : len(tokens)] = tokens
        for end in range(len(tokens), len(tokens) + most):
            found = int(self._next(self.params, text, end, how)[0])
            if found == NO_TOKEN:
                raise no_numbers(self.config, f"token {end}")
            if found in self.eos:
                return
            yield found
            if end < text.shape[1]:
                text[0, end] = found

    @cached_property
    def _next(self) -> Callable[..., Array]:
        """The token at position `end` of a text, of which nothing from there on is seen."""
        run = quantized(self.family.model.logits((1, ROUNDED)))
        last = lambda params, text, end: jax.lax.dynamic_index_in_dim(run(params, text), end - 1, 1, keepdims=False)
        return jax.jit(lambda params, text, end, how: draw(last(params, text, end), end, how))

    def sample(self, samples: int, seq_len: int, seed: int = 0) -> Int[np.ndarray, "n t"]:
        raise InputError("calib='self': a model that transformers' code computes writes no text of its own: give one.")


def opened_bridged(found: Bridged, told: Callable[[str], None]) -> tuple[BridgedModel, Callable[[], BridgedModel]]:
    """The model with jax.ShapeDtypeStructs for params, and what reads them."""
    checkpoint = found.checkpoint
    config: Any = sizes(found)
    tokenizer = checkpoint.tokenizer()
    if beyond := without_rows(config, tokenizer):
        told(beyond)
    told(f"Computed by transformers' {found.model.name}, traced; text is written without a cache.")
    model = BridgedModel(found, config, dict(found.model.params), tokenizer, checkpoint.stops)
    return model, lambda: replace(model, params=found.params())

"""Models that transformers' own code computes, in memory: scores, and text without a cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from awq_jax.errors import InputError
from awq_jax.memory import check_memory, matmul_bytes, to_be_read
from awq_jax.models.generate import ROUNDED, Speed, check_prompt, handed_over, sampling
from awq_jax.models.inputs import check_tokens, without_rows
from awq_jax.pipeline.bridged import Bridged, no_own_text, sizes
from awq_jax.pipeline.load import Model, key_of


@dataclass(frozen=True, eq=False)
class BridgedModel(Model):
    """A Model of which `family` is a Bridged and `config` its Sizes; params by torch's names."""

    family: Any
    config: Any

    def logits(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        """Logits of every position, float32; traced and compiled once for each shape."""
        check_tokens(self.config, tokens, "tokens")
        return self.family.logits(self.params, jnp.asarray(tokens, jnp.int32)).astype(jnp.float32)

    def hidden(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t h"]:
        raise NotImplementedError("a model of transformers' code gives logits alone")

    def logits_at(self, tokens: Int[Array, "b t"], places: Int[np.ndarray, " n"]) -> Float[Array, "b n v"]:
        """See `Model.logits_at`; computed of all positions."""
        return self.logits(tokens)[:, places]

    def check_writes(self) -> None:
        """Passes if the model predicts the next token from those before it.

        Raises:
          InputError: it does not.
        """
        if not self.family.model.model.can_generate():
            raise InputError(
                f"{self.family.checkpoint.path}: {self.family.model.name} writes no text: it predicts no next token."
            )

    def nbytes_of_logits(self, tokens: int) -> int:
        run, given = self.family.logits, jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        logits = jax.eval_shape(run, self.params, given)
        return to_be_read(self.params) + matmul_bytes(run, self.params, given) + 3 * 4 * logits.size

    def new_tokens(
        self,
        tokens: Int[Array | np.ndarray, " t"],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        speed: Speed | None = None,
    ) -> Iterator[int]:
        """See `Model.new_tokens`; without a cache, so that each token computes all before it anew."""
        self.check_writes()
        t = check_prompt(self.config, tokens)
        how = sampling(self.config, t, max_new_tokens, temperature, key_of(seed), top_p)
        length = -(-(t + max_new_tokens) // ROUNDED) * ROUNDED
        text = np.zeros((1, min(length, self.config.positions or length)), np.int32)
        text[0, :t] = np.asarray(tokens)
        what = f"max_new_tokens={max_new_tokens} after a prompt of {t}"
        check_memory(what, self.nbytes_of_logits(text.shape[1]), "give fewer, or a shorter prompt")
        return self._new_tokens(text, t, max_new_tokens, how, speed or Speed())

    def _new_tokens(self, text: Int[np.ndarray, "1 n"], t: int, most: int, how: Any, speed: Speed) -> Iterator[int]:
        began = time.perf_counter()
        self.family.next.lower(self.params, text, t, how).compile()
        speed.compiling = time.perf_counter() - began

        def drawn() -> Iterator[Int[Array, " b"]]:
            for end in range(t, t + most):
                token = self.family.next(self.params, text, end, how)
                yield token
                text[0, end : end + 1] = token

        yield from handed_over(drawn(), self.config, t, self.eos, speed)

    def sample(self, samples: int, seq_len: int, seed: int = 0) -> Int[np.ndarray, "n t"]:
        raise no_own_text()


def opened_bridged(found: Bridged, told: Callable[[str], None]) -> tuple[BridgedModel, Callable[[], BridgedModel]]:
    """The model with jax.ShapeDtypeStructs for params, and what reads them."""
    checkpoint = found.checkpoint
    config: Any = sizes(found)
    tokenizer = checkpoint.tokenizer()
    if beyond := without_rows(config, tokenizer):
        told(beyond)
    told(f"{found}; text is written without a cache.")
    model = BridgedModel(found, config, dict(found.model.params), tokenizer, checkpoint.stops)
    return model, lambda: replace(model, params=found.params())

"""Tokens that a model can take: refused before any work, as beyond the embedding a gather gives NaN in silence."""

from __future__ import annotations

import reprlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from awq_jax.errors import InputError


def check_length(config: Any, length: int, what: str, remedy: str | None = None) -> None:
    """Refuse more positions than the model was trained for.

    Args:
      config: of awq_jax.models.
      what: what has the length; starts the message.
      remedy: ends it; None for as many as there are positions.
    """
    if config.positions is not None and length > config.positions:
        raise InputError(
            f"{what}: {length} tokens, and the model was trained for {config.positions} positions "
            f"(max_position_embeddings): {remedy or f'give {config.positions} or fewer'}."
        )


def without_rows(config: Any, tokenizer: Any) -> str | None:
    """What to say of a tokenizer with tokens that the embedding has no rows for; None where it has none of them."""
    if not (beyond := [token for token, i in tokenizer.get_vocab().items() if i >= config.vocab]):
        return None
    one = reprlib.repr(min(beyond))
    return (
        f"The tokenizer has {len(beyond)} tokens beyond the embedding's {config.vocab} rows ({one} is one): text with "
        "them will be refused, unless you resize the embedding (resize_token_embeddings in transformers) first."
    )


def check_tokens(config: Any, tokens: Int[Array | np.ndarray, "*b t"], what: str) -> None:
    """Refuse no tokens, too many, what is no integer, and any without a row in the embedding; of traced ones the values
    are not known."""
    if np.size(tokens) == 0:
        raise InputError(f"{what} gives no token: give a text that is not empty.")
    traced = isinstance(tokens, Tracer)
    ids = tokens if traced else np.asarray(tokens)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InputError(f"{what}: tokens are {ids.dtype}, expected are integers: give those of a tokenizer.")
    check_length(config, np.shape(tokens)[-1], what)
    if traced:
        return
    if (odd := ids[(ids < 0) | (ids >= config.vocab)]).size:
        raise InputError(
            f"{what}: token {odd[0]} is none of the embedding's {config.vocab} rows. The tokenizer has more tokens "
            "than the model: take the model's own, or resize the embedding (resize_token_embeddings in transformers)."
        )

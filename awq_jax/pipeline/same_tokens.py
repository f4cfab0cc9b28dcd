"""Models are compared on the same tokens or not at all."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from awq_jax.errors import InputError
from awq_jax.text import decode, encode

SHOWN = 8
"""Tokens before a difference that are told."""


def check_same_tokens(model: Any, reference: Any, text: str, name: str) -> None:
    """Refuse to compare models to which a text is not the same tokens; says where they first differ.

    Args:
      model, reference: awq_jax.pipeline.load.Model.
      name: of the reference, for the message.
    """
    sizes = model.config.vocab, reference.config.vocab
    if sizes[0] != sizes[1]:
        raise InputError(f"{name} has {sizes[1]} tokens and the model {sizes[0]}: give the model it was made from.")
    mine, other = (encode(one.tokenizer, text).tolist() for one in (model, reference))
    if mine == other:
        return
    at = next(k for k, (a, b) in enumerate(zip_longest(mine, other)) if a != b)
    before = decode(model.tokenizer, mine[max(0, at - SHOWN) : at], special=True)
    told = lambda one, tokens: (
        f"token {tokens[at]} ({decode(one.tokenizer, [tokens[at]], special=True)!r})" if at < len(tokens) else "its end"
    )
    raise InputError(
        f"{name} reads the text as other tokens than the model: token {at}, after {before!r}, is "
        f"{told(reference, other)} to it and {told(model, mine)} to the model: give the model it was made from."
    )

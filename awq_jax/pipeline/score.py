"""Perplexity of a text, and how far a model's predictions are from a reference's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from awq_jax.errors import InputError
from awq_jax.text import encode
from awq_jax.transforms.distill import kl_of_logits


@dataclass(frozen=True)
class Score:
    """Perplexity of the predicted tokens; against a reference, over all positions, the mean KL(reference || model) in
    nats and the share with the same likeliest token."""

    perplexity: float
    kl: float | None = None
    top1: float | None = None
    tokens: int = 0


def windows(text: str, tokenizer: Any, n: int, length: int, source: str = "the text") -> Int[np.ndarray, "n t"]:
    """The first `n` windows of `length` tokens.

    Raises:
      InputError: not even one window, or windows in which nothing is predicted.
    """
    if n < 1 or length < 2:
        raise InputError(f"windows={n} length={length}: give 1 or more windows of 2 tokens or more.")
    tokens = encode(tokenizer, text[: n * length * 10])
    if len(tokens) < length:
        remedy = f"give length={len(tokens)}" if len(tokens) > 1 else "give a longer text"
        raise InputError(f"{source} has {len(tokens)} tokens, one window takes {length}: {remedy}.")
    n = min(n, len(tokens) // length)
    return tokens[: n * length].reshape(n, length)


def score(
    model: Any,
    tokens: Int[np.ndarray, "n t"],
    reference: Any = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """How well `model` predicts each window from its own beginning; every window is a text of its own.

    Args:
      model, reference: awq_jax.pipeline.load.Model, or anything with `logits(tokens)`.

    Raises:
      InputError: scores that are no numbers; says in which window and whose logits are to blame.
    """
    sums = np.zeros(3)
    for k, window in enumerate(tokens):
        progress(k, len(tokens))
        batch = jnp.asarray(window[None])
        logits = model.logits(batch)
        against = logits if reference is None else reference.logits(batch)
        found = np.array([float(x) for x in compare(logits, against, batch)])
        if not np.isfinite(found).all():
            raise InputError(blame(k, logits, against))
        sums += found
    progress(len(tokens), len(tokens))
    count, predicted = tokens.size, tokens.size - len(tokens)
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(sums[0] / predicted))
    if not np.isfinite(perplexity):
        raise InputError(f"{sums[0] / predicted:g} nats a token: no perplexity can be told. The weights are damaged.")
    if reference is None:
        return Score(perplexity, tokens=predicted)
    return Score(perplexity, float(sums[1] / count), float(sums[2] / count), predicted)


def check_same_tokens(model: Any, reference: Any, text: str, tokens: Int[np.ndarray, "n t"], name: str) -> None:
    """Refuse to compare models to which a text is not the same tokens.

    Args:
      model, reference: awq_jax.pipeline.load.Model.
      tokens: the windows of `text` by the model's tokenizer.
      name: of the reference, for the message.
    """
    sizes = model.config.vocab, reference.config.vocab
    if sizes[0] != sizes[1]:
        raise InputError(f"{name} has {sizes[1]} tokens and the model {sizes[0]}: give the model it was made from.")
    n, length = tokens.shape
    if not np.array_equal(windows(text, reference.tokenizer, n, length, name), tokens):
        raise InputError(f"{name} reads the text as other tokens than the model: give the model it was made from.")


def blame(window: int, logits: Float[Array, "b t v"], reference: Float[Array, "b t v"]) -> str:
    """Why the scores of a window are no numbers."""
    sides = {"the model's": logits} if reference is logits else {"the dense model's": reference, "the model's": logits}
    odd = {whose: int((~jnp.isfinite(x)).sum()) for whose, x in sides.items()}
    told = [f"{n} of {logits.size} of {whose} logits" for whose, n in odd.items() if n]
    return (
        f"window {window}: {' and '.join(told) or 'the scores'} are NaN or infinite. The weights are damaged, or "
        "too large for the dtype that is computed in."
    )


@jax.jit
def compare(
    logits: Float[Array, "b t v"], reference: Float[Array, "b t v"], tokens: Int[Array, "b t"]
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Sums over tokens of negative log likelihood, KL(reference || model), and equal likeliest tokens."""
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], tokens[:, 1:, None], -1).sum()
    kl = kl_of_logits(reference, logits) * tokens.size
    return nll, kl, (logits.argmax(-1) == reference.argmax(-1)).sum().astype(jnp.float32)

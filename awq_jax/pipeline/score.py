"""Perplexity of a text, and how far a model's predictions are from a reference's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from awq_jax.errors import InputError
from awq_jax.pipeline.by_token import ByToken, by_token
from awq_jax.pipeline.not_finite import origin
from awq_jax.pipeline.windows import Convention, Window, check
from awq_jax.text import decode, encode

ROUNDED = 64
"""Windows of many lengths are made a multiple of this long, so that few programs serve all."""
WORST = 10
"""Tokens that are kept as the worst."""
BEFORE = 16
"""Tokens before one of them that are told."""


@dataclass(frozen=True)
class Worst:
    """A token that a model predicts unlike the reference: KL in nats, what stands before it, the token that came, and
    what both models held for the likeliest."""

    kl: float
    before: str
    token: str
    reference: str
    model: str


@dataclass(frozen=True)
class Score:
    """How well tokens are predicted.

    Args:
      perplexity: exp of the mean loss.
      kl: against a reference, the mean of KL(reference || model) in nats; `kl_median`, `kl_p99`: over tokens.
      top1: the share of tokens with the same likeliest one; `top5`: what share of the likeliest five is the same.
      tokens: that count.
      bits_per_byte: of the text; what models of other tokenizers can be compared by.
      ratio: of the perplexity to the reference's.
      errors: standard errors, by the names of fields; from the differences between windows, as tokens of one text are
        alike; none of a single window.
      worst: the tokens of the largest KL.
    """

    perplexity: float
    kl: float | None = None
    top1: float | None = None
    tokens: int = 0
    bits_per_byte: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    top5: float | None = None
    ratio: float | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    worst: tuple[Worst, ...] = ()


def windows(text: str, tokenizer: Any, n: int, length: int, source: str = "the text") -> Int[np.ndarray, "n t"]:
    """The first `n` windows of `length` tokens.

    Raises:
      InputError: not even one window, or windows in which nothing is predicted.
    """
    check(Convention(n, length))
    tokens = encode(tokenizer, text[: n * length * 10], source=source)
    if len(tokens) < length:
        raise too_short(source, len(tokens), length)
    n = min(n, len(tokens) // length)
    return tokens[: n * length].reshape(n, length)


def too_short(source: str, tokens: int, length: int) -> InputError:
    """The error for a text that does not fill one window."""
    remedy = f"give length={tokens}" if tokens > 1 else "give a longer text"
    return InputError(f"{source} has {tokens} tokens, one window takes {length}: {remedy}.")


def score(
    model: Any,
    windows: Sequence[Window] | Int[np.ndarray, "n t"],
    reference: Any = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    tokenizer: Any = None,
    token_bytes: float | None = None,
) -> Score:
    """How well `model` predicts each window from its own beginning; every window is a text of its own.

    Args:
      model, reference: awq_jax.pipeline.load.Model, or anything with `logits(tokens)`.
      windows: rows of tokens count from the second token on.
      tokenizer: tells the worst tokens in words; none are kept without it.
      token_bytes: bytes of text that a token stands for in the mean, for `bits_per_byte`.

    Raises:
      InputError: scores that are no numbers; says in which window, whose logits are to blame, and from which layer on.
    """
    given = [w if isinstance(w, Window) else Window(w, np.arange(len(w)) > 0) for w in windows]
    lengths = {len(w.tokens) for w in given}
    longest = max(lengths)
    found: list[ByToken] = []
    for k, window in enumerate(given):
        progress(k, len(given))
        tokens = window.tokens
        if len(lengths) > 1:
            # What follows is not seen by what stands before.
            tokens = np.pad(tokens, (0, min(longest, -(-len(tokens) // ROUNDED) * ROUNDED) - len(tokens)))
        batch = jnp.asarray(tokens[None])
        logits = model.logits(batch)
        against = None if reference is None else reference.logits(batch)
        both = by_token(logits[0, :-1], None if against is None else against[0, :-1], batch[0, 1:])
        counted = np.flatnonzero(window.counts) - 1
        kept = jax.tree.map(lambda x, at=counted[counted >= 0]: np.asarray(x)[at], both)
        if not all(np.isfinite(x).all() for x in (kept.loss, kept.kl) if x is not None):
            raise InputError(blame(k, model, reference, batch, logits, against))
        found.append(kept)
    progress(len(given), len(given))
    summed = summary(found, reference is not None, token_bytes)
    if reference is None or tokenizer is None:
        return summed
    return replace(summed, worst=worst(given, found, tokenizer))


def summary(found: Sequence[ByToken], compared: bool, token_bytes: float | None) -> Score:
    """The score of windows' tokens."""
    of = partial(mean_and_error, counts=[len(one.loss) for one in found])
    tokens = sum(len(one.loss) for one in found)
    loss, loss_error = of([total(one.loss) for one in found])
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(loss))
    if not np.isfinite(perplexity):
        raise InputError(f"{loss:g} nats a token: no perplexity can be told. The weights are damaged.")
    values: dict[str, Any] = {"perplexity": (perplexity, loss_error and perplexity * loss_error)}
    if token_bytes:
        bits = np.log(2) * token_bytes
        values["bits_per_byte"] = (loss / bits, loss_error and loss_error / bits)
    if compared:
        for name, column in (("kl", "kl"), ("top1", "same"), ("top5", "shared")):
            values[name] = of([total(getattr(one, column)) for one in found])
        more, more_error = of([total(one.loss) - total(one.reference_loss) for one in found])
        values["ratio"] = (float(np.exp(more)), more_error and float(np.exp(more)) * more_error)
        kl = np.concatenate([one.kl for one in found])
        values["kl_median"], values["kl_p99"] = ((float(q), None) for q in np.percentile(kl, (50, 99)))
    errors = {name: float(error) for name, (_, error) in values.items() if error is not None}
    figures: dict[str, Any] = {name: float(value) for name, (value, _) in values.items()}
    return Score(tokens=tokens, errors=errors, **figures)


def total(values: Any) -> float:
    return float(np.sum(values, dtype=np.float64))


def mean_and_error(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """The mean over all tokens, and its standard error from that of windows: of a ratio of two sums."""
    total, n, k = sum(sums), sum(counts), len(sums)
    if k < 2:
        return total / n, None
    off = np.asarray(sums) - total / n * np.asarray(counts)
    return total / n, float(np.sqrt(k / (k - 1) * np.sum(off**2)) / n)


def worst(windows: Sequence[Window], found: Sequence[ByToken], tokenizer: Any) -> tuple[Worst, ...]:
    """The tokens of the largest KL, in words."""
    say = lambda ids: decode(tokenizer, [int(i) for i in ids], special=True)
    places = [(float(kl), w, i) for w, one in enumerate(found) for i, kl in enumerate(one.kl)]
    told = []
    for kl, w, i in sorted(places, key=lambda place: -place[0])[:WORST]:
        tokens, at = windows[w].tokens, np.flatnonzero(windows[w].counts[1:])[i] + 1
        one = found[w]
        likeliest = (say([one.reference_likeliest[i]]), say([one.likeliest[i]]))
        told.append(Worst(kl, say(tokens[max(0, at - BEFORE) : at]), say([tokens[at]]), *likeliest))
    return tuple(told)


def blame(
    window: int,
    model: Any,
    reference: Any,
    tokens: Int[Array, "b t"],
    logits: Float[Array, "b t v"],
    against: Float[Array, "b t v"] | None,
) -> str:
    """Why the scores of a window are no numbers."""
    sides = [("the model's", model, logits)]
    if against is not None:
        sides.insert(0, ("the dense model's", reference, against))
    told = []
    for whose, one, values in sides:
        if n := int((~jnp.isfinite(values)).sum()):
            where = origin(one, tokens)
            told.append(f"{n} of {values.size} of {whose} logits{f' (from {where} on)' if where else ''}")
    return (
        f"window {window}: {' and '.join(told) or 'the scores'} are NaN or infinite. The weights are damaged, or "
        "too large for the dtype that is computed in."
    )

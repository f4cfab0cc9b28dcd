"""Windows: the pieces of a text that a model reads at once, and which of their tokens count.

What a convention says of length, stride and context decides perplexity as much as the model does, so those under which
others publish are here by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from jaxtyping import Bool, Int

from awq_jax.errors import InputError


@dataclass(frozen=True)
class Passage:
    """A text of its own: its tokens, which of them count, and the bytes that one of those stands for in the mean."""

    tokens: Int[np.ndarray, " t"]
    counts: Bool[np.ndarray, " t"]
    nbytes: int = 0


@dataclass(frozen=True)
class Window:
    """What a model reads at once. The prediction of token k counts where `counts[k]`; the first is never predicted."""

    tokens: Int[np.ndarray, " t"]
    counts: Bool[np.ndarray, " t"]


@dataclass(frozen=True)
class Convention:
    """How a text becomes windows.

    Args:
      windows: from its start; None for all.
      length: tokens a window.
      stride: tokens from the start of one window to that of the next, whose first tokens are then only read again;
        None for `length`. Where it is smaller, the last window may be shorter.
      context: first tokens of every window that do not count.
      special: the text begins with the special tokens that the tokenizer asks for.
      between: stands between texts of a file.
    """

    windows: int | None = 8
    length: int = 1024
    stride: int | None = None
    context: int = 1
    special: bool = False
    between: str = "\n"

    @property
    def step(self) -> int:
        return self.length if self.stride is None else self.stride


CONVENTIONS = {
    "own": Convention(),
    # GPTQ's, which AWQ's paper, AutoAWQ, OmniQuant and others follow: all of the test split, end to end.
    "wikitext2": Convention(None, 2048, special=True, between="\n\n"),
    # Its llama-perplexity: the second half of windows of 512.
    "llama.cpp": Convention(None, 512, context=257, special=True, between="\n\n"),
    # Its page on perplexity of models of fixed length.
    "transformers": Convention(None, 1024, 512, between="\n\n"),
}
"""By the name of whose it is."""


def cut(passages: Iterable[Passage], convention: Convention) -> list[Window]:
    """The windows of some passages; those that count nothing are left out."""
    windows = (w for passage in passages for w in cut_one(passage, convention) if w.counts.any())
    return list(islice(windows, convention.windows))


def cut_one(passage: Passage, convention: Convention) -> Iterator[Window]:
    """The windows of one. Of a text in windows that do not overlap the last is whole too, as is usual."""
    n, length, step = len(passage.tokens), convention.length, convention.step
    whole = step == length and passage.counts.all()
    read = 0
    for start in range(0, n, step):
        end = min(start + length, n)
        if whole and end - start < length:
            return
        counts = passage.counts[start:end].copy()
        counts[: max(convention.context, read - start)] = False
        yield Window(passage.tokens[start:end], counts)
        read = end
        if end == n:
            return


def check(convention: Convention) -> None:
    """Refuse numbers that give no windows."""
    n, length, step = convention.windows, convention.length, convention.step
    if (n is not None and n < 1) or length < 2:
        raise InputError(f"windows={n} length={length}: give 1 or more windows of 2 tokens or more.")
    if not 1 <= step <= length:
        raise InputError(f"stride={step}: give 1 to length={length}, so that no token is passed over.")
    if convention.context >= length:
        raise InputError(f"length={length}: the convention only reads the first {convention.context} tokens of each.")

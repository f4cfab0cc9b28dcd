"""Text of tokens as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from awq_jax.text import decode


def pieces(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """The text of `tokens` without the white space around it, in pieces, each as soon as it is sure.

    A letter of several tokens waits for the last of them, white space for what follows it. Joined they are what the
    tokenizer makes of all tokens, without special ones.
    """
    seen: list[int] = []
    shown = ""
    for token in tokens:
        seen.append(token)
        # What clean-up of spaces takes away, such as one before a comma, would have been shown already.
        text = decode(tokenizer, seen).lstrip()
        sure = text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip()
        if len(sure) > len(shown) and sure.startswith(shown):
            yield sure[len(shown) :]
            shown = sure
    if rest := decode(tokenizer, seen).strip()[len(shown) :]:
        yield rest

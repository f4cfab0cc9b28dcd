"""Text of tokens as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def pieces(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """The text of `tokens` without the white space around it, in pieces, each as soon as it is sure.

    A letter of several tokens waits for the last of them, white space for what follows it. Joined they are what the
    tokenizer makes of all tokens, without special ones.
    """
    seen: list[int] = []
    shown = ""
    for token in tokens:
        seen.append(token)
        text = decoded(tokenizer, seen)
        sure = text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip()
        if len(sure) > len(shown) and sure.startswith(shown):
            yield sure[len(shown) :]
            shown = sure
    if rest := decoded(tokenizer, seen).rstrip()[len(shown) :]:
        yield rest


def decoded(tokenizer: Any, tokens: list[int]) -> str:
    # What clean-up takes away, such as a space before a comma, would have been shown already.
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).lstrip()

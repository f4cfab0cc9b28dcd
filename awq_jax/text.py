"""Text to tokens and back, with tokenizers that others made.

What one takes is bounded by what it took for the beginnings of the text; how large its file may be is
`files.LARGEST` (a vocabulary takes some 20 times that in memory).
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Int32

from awq_jax.errors import InputError, reading
from awq_jax.files import children

SURROGATE = re.compile("[\ud800-\udfff]")
"""Halves of letters, as which Python shows bytes that are no text and JSON may hold them."""
REMEDY = "repair or replace its tokenizer.json"
BEGINNINGS = (8, 64, 512, 4096)
"""Characters, tried while they are less than an eighth of the text."""
SECONDS = 5.0
"""That a beginning may take."""
GROWTH = 1000
"""Times that a text may grow before it is cut into tokens, and tokens a character."""


def encode(tokenizer: Any, text: str, *, special: bool = False) -> Int32[np.ndarray, " n"]:
    """The tokens of a text of any length, with the special tokens around it that the tokenizer asks for or without.

    Raises:
      InputError: the text is none in UTF-8; the tokenizer fails, or takes far too long.
    """
    if odd := SURROGATE.search(text):
        raise InputError(
            f"The text holds {odd[0]!r}, which UTF-8 does not have, at letter {odd.start()}: give it in UTF-8."
        )
    # verbose=False: a text may be longer than the model's context, what becomes of it is not.
    ids = lambda text: tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    with reading("The model's tokenizer cannot encode the text", REMEDY), unprinted():
        for n in (n for n in BEGINNINGS if 8 * n < len(text)):
            begun = time.monotonic()
            tokens = len(ids(text[:n]))
            if (took := time.monotonic() - begun) > SECONDS or tokens > GROWTH * n:
                raise ValueError(f"{n} characters of it take {took:.1f} s and give {tokens} tokens")
        return np.array(ids(text), np.int32)


def check_growth(tokenizer: Any) -> None:
    """Refuse a tokenizer that replaces letters by so many others that any text fills the memory."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [part for part in (getattr(backend, "normalizer", None), getattr(backend, "decoder", None)) if part]
    for node in (json.loads(part.__getstate__()) for part in parts):
        if (times := math.prod(grown(node))) > GROWTH:
            raise ValueError(f"it replaces a letter by {times}")


def grown(node: Any) -> Iterator[int]:
    """The length of what each step of a normalizer or decoder puts in place of something."""
    if isinstance(node, dict) and node.get("type") == "Replace":
        yield max(1, len(node["content"]))
    for child in children(node):
        yield from grown(child)


def decode(tokenizer: Any, tokens: Sequence[int], *, special: bool = False) -> str:
    """The text of tokens, the special ones among them or without, spaces as they are.

    Raises:
      InputError: the tokenizer fails.
    """
    with reading("The model's tokenizer cannot decode the answer", REMEDY), unprinted():
        return tokenizer.decode(tokens, skip_special_tokens=not special, clean_up_tokenization_spaces=False)


@contextmanager
def unprinted() -> Iterator[None]:
    """Holds back what is written to the error stream: libraries report there what they raise, and what follows of it.

    What was written comes out afterwards, unless the block raised.
    """
    flush()
    try:
        terminal = os.dup(2)
    except OSError:
        yield
        return
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            os.ftruncate(kept.fileno(), 0)
            raise
        finally:
            flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            kept.seek(0)
            with os.fdopen(os.dup(2), "wb") as stream:
                stream.write(kept.read())


def flush() -> None:
    """Lets out what Python still keeps for the error stream, which a process without a terminal may lack."""
    if sys.stderr is not None:
        sys.stderr.flush()

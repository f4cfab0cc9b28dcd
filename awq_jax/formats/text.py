"""Text to tokens and back, with tokenizers that others made."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Int32

from awq_jax.formats.errors import reading

REMEDY = "repair or replace its tokenizer.json"


def encode(tokenizer: Any, text: str, *, special: bool = False) -> Int32[np.ndarray, " n"]:
    """The tokens of a text of any length, with the special tokens around it that the tokenizer asks for or without.

    Raises:
      InputError: the tokenizer fails.
    """
    with reading("The model's tokenizer cannot encode the text", REMEDY), unprinted():
        # verbose=False: a text may be longer than the model's context, what becomes of it is not.
        return np.array(tokenizer(text, add_special_tokens=special, verbose=False).input_ids, np.int32)


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of tokens, without the special ones, spaces as they are.

    Raises:
      InputError: the tokenizer fails.
    """
    with reading("The model's tokenizer cannot decode the answer", REMEDY), unprinted():
        return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


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

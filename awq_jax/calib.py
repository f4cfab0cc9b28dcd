"""Calibration text: where it comes from, and how it becomes sequences of equal length."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from jinja2 import TemplateError

from awq_jax.formats.errors import InputError
from awq_jax.formats.text import encode

SHORTEST = 256
"""Tokens below which statistics would mean nothing."""


def packaged_text() -> str:
    """The text that comes with the package (see data/README.md for its sources)."""
    return resources.files("awq_jax").joinpath("data", "calibration.txt").read_text("utf-8")


def calibration_tokens(
    sources: str | Sequence[str] | None,
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    own: Callable[[int, int], Int[np.ndarray, "n t"]] | None = None,
) -> Int[np.ndarray, "n t"]:
    """At most `samples` sequences of `seq_len` tokens, spread evenly over the sources, short texts set end to end.

    Args:
      sources: one or several of: a text file, a .jsonl file of chats or texts, the id of a dataset on the hub, "self";
        none for the packaged text. Several share the samples equally; the shortest decides the length of them all.
      own: `(samples, seq_len) -> tokens` that the model itself writes, for "self".

    Raises:
      InputError: a source that cannot be read, or that has too little text; a number that is not positive.
    """
    named = [sources] if isinstance(sources, str) else list(sources or [None])
    if samples < len(named) or seq_len < 1:
        raise InputError(f"--samples {samples} --seq-len {seq_len}: give 1 or more of each, and a sample a source.")
    shares = [len(part) for part in np.array_split(range(samples), len(named))]
    parts = [_of_source(source, tokenizer, n, seq_len, own) for source, n in zip(named, shares, strict=True)]
    shortest = min(part.shape[1] for part in parts)
    return np.concatenate([part[:, :shortest] for part in parts])


def _of_source(source: str | None, tokenizer: Any, samples: int, seq_len: int, own: Any) -> Int[np.ndarray, "n t"]:
    if source == "self":
        if own is None:
            raise InputError("--calib self needs the model's own samples: load the model first.")
        return own(samples, seq_len)
    texts = [packaged_text()] if source is None else read_texts(source, tokenizer, samples)
    return cut(texts, tokenizer, samples, seq_len, source or "the packaged text")


def read_texts(source: str, tokenizer: Any, samples: int) -> list[str]:
    path = Path(source).expanduser()
    if path.is_dir():
        raise InputError(f"--calib {source} is a folder: give a text file or a .jsonl file.")
    if not path.exists():
        if path.suffix in (".txt", ".md", ".jsonl", ".json") or source.count("/") > 1:
            raise InputError(f"--calib {source}: there is no such file.")
        return list(islice(hub_texts(source, tokenizer), samples * 8))
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"--calib {source} is not UTF-8 text ({e}): give a text file or a .jsonl file.") from e
    if path.suffix != ".jsonl":
        return [text]
    rows = []
    # Not splitlines: U+2028 and others may stand unescaped in a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(as_text(json.loads(line), tokenizer))
            except (ValueError, LookupError, TypeError, TemplateError) as e:
                raise InputError(
                    f'--calib {source}, line {number}: expected {{"messages": [...]}} or {{"text": "..."}}: {e}'
                ) from e
    return rows


def as_text(row: Any, tokenizer: Any) -> str:
    """A chat through the model's chat template, or a text as it is."""
    if isinstance(row, str):
        return row
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise ValueError(f"found {row!r}")
    if messages := row.get("messages") or row.get("conversations"):
        # A template would turn a message without a role into nothing, in silence.
        if not all(isinstance(m, dict) and "role" in m for m in messages):
            raise ValueError('a message is not {"role": ..., "content": ...}')
        return tokenizer.apply_chat_template(messages, tokenize=False)
    if not isinstance(row.get("text"), str):
        raise ValueError(f"found the fields {sorted(row)}")
    return row["text"]


def hub_texts(name: str, tokenizer: Any) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as e:
        raise InputError(
            f"--calib {name} is no file; to read it as a dataset of the hub, `pip install 'awq-jax[datasets]'`."
        ) from e
    try:
        for row in load_dataset(name, split="train", streaming=True):
            yield as_text(row, tokenizer)
    except Exception as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise InputError(f"--calib {name} is no file, and the hub gives no dataset of that name: {reason}") from e


def cut(texts: Iterable[str], tokenizer: Any, samples: int, seq_len: int, source: str) -> Int[np.ndarray, "n t"]:
    """Windows of `seq_len` tokens, evenly spaced over all texts set end to end."""
    text = "\n".join(texts)
    chars = 10 * seq_len
    if len(text) > 2 * samples * chars:
        starts = np.linspace(0, len(text) - chars, samples).astype(int)
        pieces = [encode(tokenizer, text[a : a + chars])[:seq_len] for a in starts]
        if all(len(piece) == seq_len for piece in pieces):
            return np.array(pieces, np.int32)
    tokens = encode(tokenizer, text)
    if len(tokens) < SHORTEST:
        raise InputError(
            f"{source} gives {len(tokens)} tokens, calibration needs {SHORTEST} or more: give a longer text, or leave "
            "--calib out for the packaged one."
        )
    seq_len = min(seq_len, len(tokens))
    n = min(samples, max(1, round(len(tokens) / seq_len)))
    seq_len = min(seq_len, len(tokens) // n)
    starts = np.linspace(0, len(tokens) - seq_len, n).astype(int)
    return np.stack([tokens[a : a + seq_len] for a in starts])

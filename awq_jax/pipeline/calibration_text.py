"""Calibration text: where it comes from, and how it becomes sequences of equal length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from awq_jax.errors import InputError, one_line, reading
from awq_jax.near import did_you_mean, names_in
from awq_jax.pipeline.chats import Texts, as_texts, is_row
from awq_jax.pipeline.documents import SUFFIXES, check_file, read_rows
from awq_jax.text import encode

SHORTEST = 256
"""Tokens below which statistics would mean nothing."""


def packaged_text() -> str:
    """The text that comes with the package (see data/README.md for its sources)."""
    return resources.files("awq_jax").joinpath("data", "calibration.txt").read_text("utf-8")


@dataclass(frozen=True)
class Read:
    """What was read of a source of calibration text, and how much of it is used.

    Args:
      chats, texts: rows that are chats, and others.
      tokens: of all. `estimated` where the source is so long that windows are cut from its letters.
      used: tokens of the windows.
      notes: what was left out or changed.
    """

    source: str
    chats: int
    texts: int
    tokens: int
    used: int
    notes: tuple[str, ...] = ()
    estimated: bool = False

    def __str__(self) -> str:
        counted = ((self.chats, "chat"), (self.texts, "text"))
        rows = [f"{n:,} {what}{'s' if n > 1 else ''}" for n, what in counted if n]
        tokens = f"{'about ' if self.estimated else ''}{self.tokens:,} tokens"
        return "; ".join([f"{self.source}: {', '.join([*rows, tokens, f'{self.used:,} used'])}", *self.notes])


def calibration_tokens(
    sources: str | Sequence[str] | None,
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    own: Callable[[int, int], Int[np.ndarray, "n t"]] | None = None,
    told: Callable[[Read], None] = lambda read: None,
) -> Int[np.ndarray, "n t"]:
    """At most `samples` sequences of `seq_len` tokens, spread evenly over the sources, short texts set end to end.

    Args:
      sources: one or several of: a file of text or of rows (JSON, JSON lines, CSV, Parquet) that are texts or chats,
        see `pipeline.chats`; the id of a dataset on the hub; "self". None for the packaged text. Several share the
        samples equally; the shortest decides the length of them all. One named twice is read once, for two shares.
      own: `(samples, seq_len) -> tokens` that the model itself writes, for "self".
      told: called with what was read of each source, and in the last one's notes whether all is too little.

    Raises:
      InputError: a source that cannot be read, or that has too little text; a number that is not positive.
    """
    named = [sources] if isinstance(sources, str) else list(sources or [None])
    check_sources([source for source in named if source is not None], samples, seq_len)
    each, more = divmod(samples, len(named))
    shares: dict[str | None, int] = {}
    for k, source in enumerate(named):
        shares[source] = shares.get(source, 0) + each + (k < more)
    found = [_of_source(source, tokenizer, n, seq_len, own) for source, n in shares.items()]
    shortest = min(part.shape[1] for part, _ in found)
    parts = [part[:, :shortest] for part, _ in found]
    tokens = np.concatenate(parts)
    reads = [replace(read, used=part.size) for part, (_, read) in zip(parts, found, strict=True)]
    if tokens.size < SHORTEST:
        few = f"{tokens.size:,} used in all are few, of fewer than {SHORTEST} statistics mean little: take more samples"
        reads[-1] = replace(reads[-1], notes=(*reads[-1].notes, f"{few}, or longer ones"))
    for read in reads:
        told(read)
    return tokens


def check_sources(sources: Sequence[str], samples: int, seq_len: int) -> None:
    """Refuse numbers that are not positive and files that are not there, before anything is read."""
    if samples < max(1, len(sources)) or seq_len < 1:
        raise InputError(f"samples={samples} seq_len={seq_len}: give 1 or more of each, and a sample a source.")
    for source in sources:
        if source != "self" and (file := file_of(source)):
            check_file(file)


def file_of(source: str) -> Path | None:
    """The file that a source names, there or not; None where it may be a dataset of the hub."""
    path = Path(source).expanduser()
    return path if path.exists() or path.suffix.lower() in SUFFIXES or source.count("/") > 1 else None


def _of_source(
    source: str | None, tokenizer: Any, samples: int, seq_len: int, own: Any
) -> tuple[Int[np.ndarray, "n t"], Read]:
    if source == "self":
        if own is None:
            raise InputError("calib='self' needs the model's own samples: load the model first.")
        tokens = own(samples, seq_len)
        return tokens, Read("what the model writes", 0, len(tokens), tokens.size, tokens.size)
    name = source or "the packaged text"
    texts = Texts([packaged_text()], 0, ()) if source is None else read_texts(source, tokenizer, samples)
    tokens, total, estimated = cut(texts.texts, tokenizer, samples, seq_len, texts.named(name))
    others = len(texts.texts) - texts.chats if source else 0
    return tokens, Read(name, texts.chats, others, total, tokens.size, texts.notes, estimated)


def read_texts(source: str, tokenizer: Any, samples: int) -> Texts:
    """The texts of a file or of a dataset of the hub."""
    with reading(f"{source} cannot be read as calibration text", "repair or replace it"):
        if file := file_of(source):
            return as_texts(read_rows(file, is_row), tokenizer, source)
        rows = enumerate(islice(hub_rows(source), samples * 8), 1)
        return as_texts(((f"row {k}", row) for k, row in rows), tokenizer, source)


def hub_rows(name: str, config: str | None = None, split: str = "train") -> Iterator[Any]:
    """The rows of a dataset of the hub, as they come."""
    try:
        from datasets import load_dataset
    except ImportError as e:
        near = did_you_mean(name, names_in(Path()))
        raise InputError(
            f"{name} is no file{near}; to read it as a dataset of the hub, `pip install 'awq-jax[datasets]'`."
        ) from e
    try:
        yield from load_dataset(*filter(None, (name, config)), split=split, streaming=True)
    except Exception as e:
        raise InputError(
            f"{name} is no file, and the hub gives no dataset of that name ({one_line(e, 160)}): check the name and "
            "the connection, or give a file."
        ) from e


def cut(
    texts: Iterable[str], tokenizer: Any, samples: int, seq_len: int, source: str
) -> tuple[Int[np.ndarray, "n t"], int, bool]:
    """Windows of `seq_len` tokens, evenly spaced over all texts set end to end; all tokens there are, and whether that
    is an estimate: of a long text only the windows become tokens."""
    text = "\n".join(texts)
    chars = 10 * seq_len
    if len(text) > 2 * samples * chars:
        starts = np.linspace(0, len(text) - chars, samples).astype(int)
        pieces = [encode(tokenizer, text[a : a + chars], source=source) for a in starts]
        if all(len(piece) >= seq_len for piece in pieces):
            total = round(sum(map(len, pieces)) * len(text) / (chars * samples))
            return np.array([piece[:seq_len] for piece in pieces]), total, True
    tokens = encode(tokenizer, text, source=source)
    if len(tokens) < SHORTEST:
        raise InputError(
            f"{source} gives {len(tokens)} tokens, calibration needs {SHORTEST} or more: give a longer text, or leave "
            "calib= out for the packaged one."
        )
    seq_len = min(seq_len, len(tokens))
    n = min(samples, max(1, round(len(tokens) / seq_len)))
    seq_len = min(seq_len, len(tokens) // n)
    starts = np.linspace(0, len(tokens) - seq_len, n).astype(int)
    return np.stack([tokens[a : a + seq_len] for a in starts]), len(tokens), False

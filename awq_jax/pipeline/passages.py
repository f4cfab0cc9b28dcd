"""A source of text as passages: texts end to end, and chats, of which only counts what the model says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax.errors import InputError, reading
from awq_jax.formats.chat import render
from awq_jax.pipeline.calibration_text import hub_rows
from awq_jax.pipeline.chats import BETWEEN, Chat, found_in, is_row, with_system
from awq_jax.pipeline.documents import SUFFIXES, Row, read_rows
from awq_jax.pipeline.windows import Convention, Passage
from awq_jax.text import encode

NAMED = {"wikitext-2": "Salesforce/wikitext:wikitext-2-raw-v1:test"}
"""Datasets of the hub by shorter names."""
SAYS = "assistant"
Piece = tuple[str, bool]
"""A text, and whether it counts."""


def passages(source: str, tokenizer: Any, convention: Convention) -> tuple[list[Passage], tuple[str, ...]]:
    """The texts of a source, the rows that are texts as one of them; and what was left out.

    Args:
      source: a file of text or of rows that are texts or chats, or ID[:CONFIG[:SPLIT]] of a dataset of the hub.

    Raises:
      InputError: a source that cannot be read.
    """
    found, notes = found_in(rows_of(source, convention), source)
    texts = [row for _, row in found if isinstance(row, str)]
    chats = [(name, row) for name, row in found if isinstance(row, Chat)]
    written: list[list[Piece]] = [[(convention.between.join(texts), True)]] if texts else []
    if chats:
        names, asked = [name for name, _ in chats], [chat for _, chat in chats]
        taken, changed = with_system(asked, tokenizer) if tokenizer.chat_template else (asked, [])
        written += said(taken, tokenizer, names)
        notes = (*notes, *changed)
    return [passage(pieces, tokenizer, convention) for pieces in written], notes


def file_of(source: str) -> Path | None:
    """The file that a source names, there or not; None where it is a dataset of the hub."""
    path = Path(source).expanduser()
    there = path.exists() or path.suffix.lower() in SUFFIXES
    return path if there or (source not in NAMED and source.count("/") != 1) else None


def rows_of(source: str, convention: Convention) -> Iterator[Row]:
    """The rows of a file, or as many of a dataset as its windows may need."""
    with reading(f"{source} cannot be read as text", "repair or replace it"):
        if file := file_of(source):
            yield from read_rows(file, is_row)
            return
        most = None if convention.windows is None else convention.windows * convention.length
        for k, row in enumerate(islice(hub_rows(*NAMED.get(source, source).split(":")), most), 1):
            yield f"row {k}", row


def passage(pieces: list[Piece], tokenizer: Any, convention: Convention) -> Passage:
    """The tokens of pieces, each made by itself: so is an answer that follows a prompt."""
    if convention.windows is not None and len(pieces) == 1:
        # Of a long text only the start is read.
        pieces = [(pieces[0][0][: (convention.windows + 1) * convention.length * 10], pieces[0][1])]
    tokens = [encode(tokenizer, text, special=convention.special and not k) for k, (text, _) in enumerate(pieces)]
    counts = [np.full(len(ids), counted) for ids, (_, counted) in zip(tokens, pieces, strict=True)]
    nbytes = sum(len(text.encode()) for text, counted in pieces if counted)
    return Passage(np.concatenate(tokens), np.concatenate(counts), nbytes)


def said(chats: Sequence[Chat], tokenizer: Any, names: Sequence[str]) -> list[list[Piece]]:
    """Each chat in pieces, as its template writes it: what the model is told, what it says, and so on in turn.

    It says all from where it is asked to until its turn ends, the mark of the end with it.
    """
    if not tokenizer.chat_template:
        return [[(m["content"] + BETWEEN, m["role"] == SAYS) for m in chat.messages] for chat in chats]
    turns = [(c, k) for c, chat in enumerate(chats) for k, m in enumerate(chat.messages) if m["role"] == SAYS]

    def write(ends: Sequence[tuple[int, int]], **options: Any) -> list[str]:
        begun = [chats[c].messages[:end] for c, end in ends]
        tools, called = [chats[c].tools for c, _ in ends], [names[c] for c, _ in ends]
        return render(tokenizer, begun, tools, names=called, **options)

    written = write([(c, len(chat.messages)) for c, chat in enumerate(chats)] + [(c, k + 1) for c, k in turns])
    wholes, throughs = written[: len(chats)], written[len(chats) :]
    asked = [(c, k) for c, k in turns if k]
    befores = dict(zip(asked, write(asked, add_generation_prompt=True), strict=True))
    spans: list[list[tuple[int, int]]] = [[] for _ in chats]
    for (c, k), through in zip(turns, throughs, strict=True):
        content = chats[c].messages[k]["content"].strip()
        spans[c].append(span(wholes[c], befores.get((c, k)), through, content, spans[c], names[c]))
    return [list(pieces(whole, found)) for whole, found in zip(wholes, spans, strict=True)]


def span(
    whole: str, before: str | None, through: str, content: str, earlier: list[tuple[int, int]], name: str
) -> tuple[int, int]:
    """From where to where a turn stands; by its words where a template writes earlier turns in another way."""
    end = len(through.rstrip())
    if before is not None and whole.startswith(before) and whole.startswith(through[:end]) and len(before) < end:
        return len(before), end
    start = whole.find(content, earlier[-1][1] if earlier else 0)
    if start < 0:
        raise InputError(f"{name}: the chat template does not write what the model says ({content[:40]!r}).")
    return start, start + len(content)


def pieces(whole: str, spans: list[tuple[int, int]]) -> Iterator[Piece]:
    at = 0
    for start, end in spans:
        yield whole[at:start], False
        yield whole[start:end], True
        at = end
    yield whole[at:], False

"""`evaluate`: how well checkpoints predict texts, and how far they are from the model that they were made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from awq_jax.errors import InputError
from awq_jax.memory import check_memory, to_be_read
from awq_jax.models.inputs import check_tokens
from awq_jax.near import did_you_mean
from awq_jax.pipeline.documents import check_file
from awq_jax.pipeline.load import Model, opened
from awq_jax.pipeline.passages import file_of, passages
from awq_jax.pipeline.same_tokens import check_same_tokens
from awq_jax.pipeline.score import Score, score, too_short
from awq_jax.pipeline.windows import CONVENTIONS, Convention, Window, check, cut
from awq_jax.text import decode

Scores = dict[str, dict[str, Score]]
"""By checkpoint, by text."""


def evaluate(
    models: str | Path | Sequence[str | Path],
    texts: str | Path | Sequence[str | Path],
    against: str | Path | None = None,
    *,
    convention: str = "own",
    windows: int | None = None,
    length: int | None = None,
    stride: int | None = None,
    told: Callable[[str], None] = lambda line: None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Scores:
    """The scores of checkpoints, and of `against` if it is given, on texts; computed in float32 everywhere, so that
    those of two machines can be compared.

    Args:
      models: any checkpoints, see `load`.
      texts: files of text, or of rows that are texts or chats, of which what the model says counts; ID[:CONFIG[:SPLIT]]
        of datasets of the hub, or wikitext-2. Best what calibration never saw.
      against: the model to compare with: scores then have KL(against || model) and agreement.
      convention: of `pipeline.windows.CONVENTIONS`, what the three that follow are where they are not given.
      windows: from the start of a text; all of chats without it.
      length: tokens a window.
      stride: tokens from one window's start to the next.
      told: called with a line on what is other than one may expect.
      progress: called with what is done, how much of it, and of how much.

    Raises:
      InputError: a file that cannot be read; a text that is too short or not the same tokens to all models; windows
        that the models or the memory have no room for; scores that are no numbers. What can be told is told before
        the weights are read.

    Example:
      >>> awq.evaluate("smollm2-awq", "news.txt", "SmolLM2-135M-Instruct")["smollm2-awq"]["news.txt"].kl
    """
    if convention not in CONVENTIONS:
        near = did_you_mean(convention, CONVENTIONS)
        raise InputError(f"convention={convention!r} is none of {', '.join(CONVENTIONS)}{near}.")
    given = {"windows": windows, "length": length, "stride": stride}
    how = replace(CONVENTIONS[convention], **{name: n for name, n in given.items() if n is not None})
    check(how)
    sources = list(map(str, as_list(texts, "texts")))
    for file in filter(None, map(file_of, sources)):
        check_file(file)
    names: list[str] = list(dict.fromkeys(map(str, as_list(models, "models"))))
    everyone: list[str] = list(dict.fromkeys(names + ([] if against is None else [str(against)])))
    found = {name: opened(name, jnp.float32, told) for name in everyone}
    for model, _ in found.values():
        model.check_writes()
    first, reference = found[names[0]][0], None if against is None else found[str(against)][0]
    read = {text: prepared(text, first, how, windows) for text in sources}
    for name, (model, _) in found.items():
        for text, of in read.items():
            if model is not first:
                check_same_tokens(first, model, of.words, name)
            for window in of.windows:
                check_tokens(model.config, window.tokens, f"{text} in windows of length={how.length}")
    needed = max(one.nbytes_of_logits(how.length) for one, _ in found.values())
    needed += to_be_read(reference.params) if reference else 0
    check_memory(f"A window of length={how.length}", needed, "give a smaller one, or more memory")
    for text, of in read.items():
        if of.whole and how.windows is not None and len(of.windows) < how.windows:
            told(f"{text} fills {len(of.windows)} of {how.windows} windows.")
    dense = None
    scores: Scores = {}
    # The reference stays in memory; of the others one at a time.
    for k, name in enumerate(sorted(everyone, key=lambda name: name != str(against))):
        progress("loading", k, len(everyone))
        model = found[name][1]()
        if name == str(against):
            dense = model
        other = dense if name in names else None
        scores[name] = {text: score_on(of, model, other, progress) for text, of in read.items()}
    progress("loading", len(everyone), len(everyone))
    return {name: scores[name] for name in everyone}


@dataclass(frozen=True)
class Prepared:
    """A text in windows, whether all of them counts, their words, and the bytes that a token stands for."""

    windows: list[Window]
    whole: bool
    words: str
    token_bytes: float


def prepared(text: str, model: Model, how: Convention, asked: int | None) -> Prepared:
    """The windows of a text; chats are read to the end if not `asked` for fewer windows.

    Raises:
      InputError: it cannot be read, or does not fill one.
    """
    found, notes = passages(text, model.tokenizer, how)
    named = f"{text} ({'; '.join(notes)})" if notes else text
    longest = max((len(passage.tokens) for passage in found), default=0)
    whole = all(passage.counts.all() for passage in found)
    if whole and longest < how.length:
        raise too_short(named, longest, how.length)
    windows = cut(found, how if whole else replace(how, windows=asked))
    if not windows:
        raise InputError(f"{named}: nothing in it is said by the model: give chats with answers.")
    tokens = sum(int(passage.counts.sum()) for passage in found)
    words = "".join(decode(model.tokenizer, window.tokens.tolist(), special=True) for window in windows)
    return Prepared(windows, whole, words, sum(passage.nbytes for passage in found) / tokens)


def score_on(of: Prepared, model: Any, reference: Any, progress: Callable[[str, int, int], None]) -> Score:
    """The score of one model on one text."""
    moving = lambda k, n: progress("window", k, n)
    return score(model, of.windows, reference, moving, tokenizer=model.tokenizer, token_bytes=of.token_bytes)


def as_list(given: str | Path | Sequence[str | Path], name: str) -> list[str | Path]:
    """Paths, of which one may stand alone."""
    found: list[Any] = list(given) if isinstance(given, list | tuple | set) else [given]
    if odd := [one for one in found if not isinstance(one, str | Path)]:
        raise InputError(f"{name} has a {type(odd[0]).__name__}: give the path of a folder or file, or several.")
    if not found:
        raise InputError(f"There are no {name}: give the path of a folder or file, or several.")
    return found

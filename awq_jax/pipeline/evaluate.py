"""`evaluate`: how well a checkpoint predicts a file of text, and how far it is from the model it was made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp

from awq_jax.memory import check_memory, to_be_read
from awq_jax.models.inputs import check_tokens
from awq_jax.pipeline.chats import as_texts, is_row
from awq_jax.pipeline.documents import read_rows
from awq_jax.pipeline.load import opened
from awq_jax.pipeline.score import Score, check_same_tokens, score
from awq_jax.pipeline.score import windows as windows_of


def evaluate(
    model: str | Path,
    text: str | Path,
    dense: str | Path | None = None,
    *,
    windows: int = 8,
    length: int = 1024,
    told: Callable[[str], None] = lambda line: None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Score]:
    """The scores of a model, and of `dense` if it is given, by their names; computed in float32 everywhere, so that
    those of two machines can be compared.

    Args:
      model: any checkpoint, see `load`.
      text: a file of text, or of rows that are texts or chats; best one that calibration never saw.
      dense: the model to compare with: the first's score then has KL(dense || model) and top-1 agreement.
      windows: from the start of the text.
      length: tokens a window.
      told: called with a line on what is other than one may expect.
      progress: called with what is done, how much of it, and of how much.

    Raises:
      InputError: a file that cannot be read; a text that is too short or not the same tokens to both models; windows
        that the models or the memory have no room for; scores that are no numbers. What can be told is told before
        the weights are read.

    Example:
      >>> awq.evaluate("smollm2-awq", "news.txt", dense="SmolLM2-135M-Instruct")["smollm2-awq"].kl
    """
    rows = read_rows(Path(text), is_row)
    opened_model, read = opened(model, jnp.float32, told)
    reference, read_reference = (None, lambda: None) if dense is None else opened(dense, jnp.float32, told)
    found = as_texts(rows, opened_model.tokenizer, str(text))
    joined = "\n".join(found.texts)
    tokens = windows_of(joined, opened_model.tokenizer, windows, length, found.named(str(text)))
    if reference is not None:
        check_same_tokens(opened_model, reference, joined, tokens, str(dense))
    for one in (opened_model, reference or opened_model):
        check_tokens(one.config, tokens, f"{text} in windows of length={length}")
    needed = opened_model.nbytes_of_logits(length) + (to_be_read(reference.params) if reference else 0)
    check_memory(f"A window of length={length}", needed, "give a smaller one, or more memory")
    if len(tokens) < windows:
        told(f"{text} fills {len(tokens)} of {windows} windows.")
    progress("loading", 0, 1)
    loaded, loaded_reference = read(), read_reference()
    progress("loading", 1, 1)
    scores = {str(model): score(loaded, tokens, loaded_reference, lambda k, n: progress("window", k, n))}
    if dense is not None and str(dense) not in scores:
        scores[str(dense)] = score(loaded_reference, tokens)
    return scores

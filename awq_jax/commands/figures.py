"""What `awq-jax eval` shows: figures of checkpoints beside each other, text by text, and the tokens that moved most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from awq_jax.pipeline.score import Score, Worst


class Figure(NamedTuple):
    """How a field of a score is shown."""

    name: str
    title: str
    form: str

    def cell(self, score: Score) -> str:
        """The value and its standard error."""
        value, error = getattr(score, self.name), score.errors.get(self.name)
        if value is None:
            return ""
        return format(value, self.form) + ("" if error is None else f" ± {format(error, self.form)}")


FIGURES = (
    Figure("perplexity", "perplexity", ".2f"),
    Figure("ratio", "to the dense one's", ".3f"),
    Figure("bits_per_byte", "bits a byte", ".3f"),
    Figure("kl", "KL to dense", ".4f"),
    Figure("kl_median", "median", ".4f"),
    Figure("kl_p99", "99 % below", ".3f"),
    Figure("top1", "same top-1", ".1%"),
    Figure("top5", "same of top-5", ".1%"),
    Figure("tokens", "tokens", ",d"),
)


def figures_table(scores: Mapping[str, Mapping[str, Score]]) -> Table:
    """A column for each checkpoint, a section for each text, standard errors after ±."""
    table = Table(title="How well the texts are predicted")
    table.add_column("")
    for name in scores:
        table.add_column(escape(name), justify="right", overflow="fold")
    texts = list(next(iter(scores.values())))
    for text in texts:
        if len(texts) > 1:
            table.add_row(f"[bold]{escape(text)}[/bold]")
        of = [by_text[text] for by_text in scores.values()]
        for figure in FIGURES:
            if any(cells := [figure.cell(score) for score in of]):
                table.add_row(figure.title, *cells)
        table.add_section()
    return table


def worst_table(name: str, text: str, worst: Sequence[Worst]) -> Table:
    """The tokens that a model predicts least like the dense one, after what stands before them."""
    table = Table(title=escape(f"Where {name} differs most on {text}"))
    for column in ("KL", "after", "came", "dense", "model"):
        table.add_column(column, justify="right" if column in ("KL", "after") else "left")
    for one in worst:
        words = (escape(repr(word)[1:-1]) for word in (one.before[-40:], one.token, one.reference, one.model))
        table.add_row(f"{one.kl:.2f}", *words)
    return table

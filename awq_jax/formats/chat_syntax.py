"""Whether chat templates are written as templates are; they are parsed for it and nothing of them is run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.nodes import Node

from awq_jax.errors import InputError, reading
from awq_jax.files import LARGEST, read_json, read_text

IN_JSON = ("tokenizer_config.json", "chat_template.json")


class Generation(Extension):
    """transformers' own tag, around what the model says."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: Any) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


SYNTAX = Environment(extensions=["jinja2.ext.loopcontrols", Generation])


def broken_templates(files: Iterable[Path]) -> list[str]:
    """A line on each chat template among a tokenizer's files that is none."""
    said = []
    for file in files:
        try:
            for template in templates_in(file):
                with reading(f"The chat template in {file.name} is broken", "repair it, it is copied as it is"):
                    check(template)
        except InputError as e:
            said.append(str(e))
    return said


def templates_in(file: Path) -> Iterator[Any]:
    """The chat templates that a file of a tokenizer holds."""
    if file.suffix == ".jinja":
        yield read_text(file, largest=LARGEST)
    elif file.name in IN_JSON and (found := read_json(file).get("chat_template")) is not None:
        # Several have names.
        for one in found if isinstance(found, list) else [found]:
            yield one.get("template") if isinstance(one, dict) else one


def check(template: Any) -> None:
    """Raises what is wrong with a template."""
    if not isinstance(template, str):
        raise ValueError(f"it is no text, but a {type(template).__name__}")
    try:
        SYNTAX.parse(template)
    except TemplateSyntaxError as e:
        raise ValueError(f"line {e.lineno}: {e.message}") from e

"""A file of prompts: rows with a question, and what is known of its answer."""

from __future__ import annotations

import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

from awq_jax.errors import InputError
from awq_jax.near import did_you_mean
from awq_jax.pipeline.chats import CHATS, turns
from awq_jax.pipeline.documents import Row, read_rows
from awq_jax.records.checks import CHECKS, check_checks
from awq_jax.records.prompt import Prompt

ASKED = ("prompt", "messages", "text")
FIELDS = ("name", "tags", "checks", "system", *ASKED, *CHECKS)
KNOWN = 'a prompt as {"prompt": "...", "name": "...", "tags": [...], "contains": "..."}'


def read_prompts(file: Path) -> tuple[Prompt, ...]:
    """The prompts of a file of rows (JSON lines, JSON, CSV, Parquet).

    A row has a `prompt`, the `messages` of a chat up to the question, or a `text` to continue as it is; it may have a
    `system` turn, a `name`, `tags`, and checks: `contains`, `regex`, `json`, `expected`, by themselves or in `checks`.

    Raises:
      InputError: a row that is none, two of one name; says in which line.
    """
    rows = read_rows(file, lambda row: any(field in row for field in (*ASKED, *CHATS)))
    found = [prompt_of(file, k, row) for k, row in enumerate(rows, 1)]
    twice = [name for name, n in Counter(one.name for one in found).items() if n > 1]
    if twice:
        lines = [where for (where, _), one in zip(rows, found, strict=True) if one.name == twice[0]]
        raise InputError(f"{file}, {lines[1]}: {twice[0]!r} is the name of {lines[0]} too: give each its own.")
    return tuple(found)


def prompt_of(file: Path, number: int, row: Row) -> Prompt:
    """The prompt of a row."""
    where, value = row
    try:
        return parsed(value, number)
    except ValueError as e:
        raise InputError(f"{', '.join(filter(None, (str(file), where)))}: expected {KNOWN}: {e}.") from e


def parsed(value: Any, number: int) -> Prompt:
    """The prompt that a row's fields say."""
    if not isinstance(value, dict):
        raise ValueError(f"found {reprlib.repr(value)}")
    fields = {name: held for name, held in value.items() if held is not None and held != ""}
    for name in fields:
        if name not in FIELDS:
            raise ValueError(f"it has no field {name!r}{did_you_mean(name, FIELDS)}")
    asked = [name for name in ASKED if name in fields]
    if not asked and (empty := [name for name in ASKED if value.get(name) == ""]):
        raise ValueError(f"{empty[0]} is empty")
    if len(asked) != 1:
        raise ValueError(f"found {' and '.join(asked) or 'none'} of {', '.join(ASKED)}, one is needed")
    checks = fields.get("checks", {})
    if not isinstance(checks, dict):
        raise ValueError(f"checks is {reprlib.repr(checks)}, no object")
    if unknown := next((name for name in checks if name not in CHECKS), None):
        raise ValueError(f"there is no check {unknown!r}{did_you_mean(unknown, CHECKS)}")
    checks = {**checks, **{name: fields[name] for name in CHECKS if name in fields}}
    check_checks(checks)
    tags = fields.get("tags", ())
    tags = (tags,) if isinstance(tags, str) else tuple(tags)
    name = fields.get("name", f"prompt {number}")
    if not isinstance(name, str) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError("name is to be a text, tags a list of them")
    return Prompt(name, question(fields, asked[0]), tags, checks)


def question(fields: dict[str, Any], kind: str) -> Any:
    """What is asked: a text, or turns that end with the user's."""
    value = fields[kind]
    if kind == "text":
        if not isinstance(value, str):
            raise ValueError(f"text is {reprlib.repr(value)}, no text")
        return value
    if kind == "prompt" and not isinstance(value, str):
        raise ValueError(f"prompt is {reprlib.repr(value)}, no text")
    said = turns(value, "user")
    if not said or said[-1]["role"] == "assistant":
        raise ValueError("the last of its messages is not what the model is to answer")
    system = fields.get("system")
    return (({"role": "system", "content": system},) if system else ()) + said

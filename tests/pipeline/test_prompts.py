"""Files of prompts, and what is said of lines that are none."""

import json

import pytest

from awq_jax.errors import InputError
from awq_jax.pipeline.prompts import read_prompts
from awq_jax.records.prompt import Prompt


def written(folder, *rows):
    file = folder / "p.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


def test_rows_of_every_kind(tmp_path):
    turn = {"role": "user", "content": "Hi"}
    file = written(
        tmp_path,
        {"prompt": "Hi"},
        {"messages": [turn], "name": "chat", "tags": ["a", "b"], "contains": "x", "system": "Be kind."},
        {"text": "Once", "tags": "a", "checks": {"regex": "x", "json": True}, "expected": None},
    )
    assert read_prompts(file) == (
        Prompt("prompt 1", (turn,)),
        Prompt("chat", ({"role": "system", "content": "Be kind."}, turn), ("a", "b"), {"contains": "x"}),
        Prompt("prompt 3", "Once", ("a",), {"regex": "x", "json": True}),
    )
    (tmp_path / "p.csv").write_text("prompt,name\nHi,one\n")
    assert read_prompts(tmp_path / "p.csv") == (Prompt("one", (turn,)),)


def test_a_version_is_what_is_asked_and_nothing_else():
    turn = ({"role": "user", "content": "Hi"},)
    assert Prompt("a", turn).version == Prompt("b", turn, ("t",), {"contains": "x"}).version
    assert len({Prompt("a", asked).version for asked in (turn, "Hi", "Hi ")}) == 3
    assert Prompt("a", turn).text == "Hi"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "line 2: not JSON"),
        ({"promt": "a"}, r"line 2: expected a prompt .*: it has no field 'promt' \(did you mean prompt\?\)"),
        ({"prompt": ""}, "line 2: .*: prompt is empty"),
        ({"name": "a"}, "line 2: .*: found none of prompt, messages, text, one is needed"),
        ({"prompt": "a", "text": "b"}, "found prompt and text of"),
        ({"prompt": 3}, "prompt is 3, no text"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the last of its messages is not what the model is"),
        ({"prompt": "a", "regex": "("}, r"line 2: .* regex '\(' is none"),
        ({"prompt": "a", "checks": {"contain": "b"}}, r"there is no check 'contain' \(did you mean contains\?\)"),
        ({"prompt": "a", "checks": ["b"]}, "checks is .*, no object"),
        ({"prompt": "a", "name": 3}, "name is to be a text"),
        ({"prompt": "a", "name": "first"}, "line 2: 'first' is the name of line 1 too"),
        ([1], r"line 2: expected a prompt .*: found \[1\]"),
    ],
)
def test_lines_that_are_no_prompts_are_named(tmp_path, row, says):
    with pytest.raises(InputError, match=says):
        read_prompts(written(tmp_path, {"prompt": "ok", "name": "first"}, row))

"""Data where words should be, told from words that look a little like it."""

import csv
import json
import re

import pytest
from checkpoints import tokenizer
from hypothesis import given
from hypothesis import strategies as st

from awq_jax.errors import InputError
from awq_jax.pipeline.calibration_text import read_texts
from awq_jax.pipeline.chats import Chat, as_chat, as_texts
from awq_jax.pipeline.shown import is_data, shown

ROW = {"text": "Some words, and 'some' more."}
LINES = "\n".join([json.dumps(ROW)] * 3)
TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]


@pytest.mark.parametrize(
    "text",
    [
        "// generated\n" + LINES,
        "{text: 1}\n" + LINES,
        "Some words\n" + LINES,
        "// generated\n" + json.dumps([ROW, ROW], indent=1),
        "# rows\n" + "\n# row\n".join([json.dumps(ROW)] * 3),
        ",\n".join([json.dumps(ROW)] * 2),
        json.dumps(json.dumps(ROW)),
        json.dumps([json.dumps(ROW)]),
        repr(json.dumps(ROW)),
        repr(["a", "Some words."]),
        repr(("a", ROW)),
        f"{['a', 'b']}\n{['c', ROW]}\n",
        repr({"text": "words", "score": float("nan")}),
        "[{'role': 'user', 'content': 'Who?'}\n {'role': 'assistant', 'content': 'Me.'}]",
        repr(b"Some words"),
        "[12, 7, 301]",
        repr([r"\d"]),
    ],
)
def test_data(text):
    assert is_data(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[Silence]",
        "(Nevermore)",
        '("Nevermore")',
        '"Quoted," he said, "twice."',
        '"Quoted."\n"Again."',
        "'tis said, and 'twas'",
        "but he said 'no'",
        "[1]",
        "[None]",
        "[1] A footnote.\n[2] Another.",
        "[[Wiki]] page",
        "xs = [1, 2]\nfor x in xs:\n    print({'x': x})",
        "{x for x in xs}",
        f"Such a row is\n\n{json.dumps(ROW)}\n\nwhere text, as in most sets of such rows, is the field that is read.",
        "[" * 100_000,
        '["a' * 1000 + "]",
    ],
)
def test_words(text):
    assert not is_data(text)


WORD = st.sampled_from(
    ["rain", "{a}", "(b)", "['c']", '"d"', "12", "[3]", "x['y']", 'a {"z": 1}', "it's", ",", ":", "—"]
)
PROSE = st.lists(WORD, min_size=1, max_size=8).map(lambda words: " ".join([*words, "and rain"]))


@given(lines=st.lists(PROSE, min_size=1, max_size=4), ends=st.sampled_from(["{}", "[{}]", "({})", '"{}"', "{}."]))
def test_prose_is_never_data(lines, ends):
    assert not is_data("\n".join(ends.replace("{}", line) for line in lines))


JSON = st.recursive(
    st.text(max_size=5),
    lambda inner: st.lists(inner, min_size=2, max_size=3) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@given(
    value=st.lists(JSON, min_size=2) | st.dictionaries(st.text(), JSON, min_size=1),
    write=st.sampled_from([json.dumps, repr]),
)
def test_what_is_written_is_shown(value, write):
    assert shown(f" {write(value)}\n") == shown(write(write(value))) == value
    assert is_data(write(value))


def written(tmp_path, name, content):
    file = tmp_path / name
    if name.endswith(".csv"):
        with file.open("w", newline="") as f:
            csv.writer(f).writerows(content)
    else:
        file.write_text(content, "utf-8")
    return str(file)


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.txt", "// generated\n" + LINES, "a.txt"),
        ("a.txt", f"{ROW}\n{ROW}", "a.txt"),
        ("a.jsonl", "\n".join([json.dumps("words"), json.dumps(json.dumps(ROW))]), "a.jsonl, line 2"),
        ("a.json", json.dumps(["words", json.dumps(ROW)]), "a.json, row 2"),
        ("a.jsonl", json.dumps({"text": json.dumps({"messages": TURNS})}), "a.jsonl, line 1"),
        ("a.csv", [["text"], ["words"], [json.dumps({"messages": TURNS})]], "a.csv, row 2"),
        ("a.csv", [["text"], [str(["a", "b"])]], "a.csv, row 1"),
        ("a.jsonl", json.dumps([{"role": "user", "content": json.dumps(TURNS)}]), "a.jsonl, line 1"),
    ],
)
def test_data_is_refused_wherever_it_stands(tmp_path, name, content, where):
    source = written(tmp_path, name, content)
    with pytest.raises(InputError, match=f"{re.escape(where)}: expected .* no words: put the words there"):
        read_texts(source, tokenizer(), 1)


@pytest.mark.parametrize("content", ['{"answer": 3}', "['a', 'b']", "[1, 2]", '[{"type": "dog", "text": "bark"}]'])
def test_turns_of_a_chat_may_be_json(content):
    row = [TURNS[0], {"role": "assistant", "content": content}]
    assert as_chat(row) == Chat(tuple(row))
    assert content in as_texts([("row 1", row)], tokenizer(), "a.json").texts[0]


def test_parts_of_a_message_as_a_string_are_its_text():
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}]
    for write in (json.dumps, repr):
        assert as_chat([{"role": "user", "content": write(parts)}]) == Chat((TURNS[0],))

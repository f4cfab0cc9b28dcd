"""Which rows a file holds, whatever it is called and however it is laid out."""

import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awq_jax.errors import InputError
from awq_jax.pipeline.chats import is_row
from awq_jax.pipeline.documents import read_rows

ROWS = [{"text": "one \u2028 two"}, {"text": "[three]"}]
CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
LINES = "\n".join(map(json.dumps, ROWS))


def rows_of(file, content):
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return [row for _, row in read_rows(file, is_row)]


@pytest.mark.parametrize("name", ["a.json", "a.JSONL", "a.ndjson", "a.txt", "a"])
@pytest.mark.parametrize(
    "content",
    [
        LINES,
        "\n\r\n" + LINES + "\n \n",
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        json.dumps({"version": 1, "data": ROWS}),
        "\n".join(json.dumps(row, indent=1) for row in ROWS),
        json.dumps(ROWS).encode("utf-8-sig"),
        json.dumps(ROWS, ensure_ascii=False),
    ],
)
def test_json_is_known_by_what_it_is(tmp_path, name, content):
    assert rows_of(tmp_path / name, content) == ROWS


@pytest.mark.parametrize(
    ("value", "rows"),
    [
        ({"text": "one"}, [{"text": "one"}]),
        ({"messages": CHAT}, [{"messages": CHAT}]),
        (CHAT, [CHAT]),
        ([CHAT, CHAT], [CHAT, CHAT]),
        ({"chats": [CHAT]}, [CHAT]),
        ({"chat": CHAT}, [CHAT]),
        (["a", "b"], ["a", "b"]),
        ({"text": ["a", "b"]}, ["a", "b"]),
        ([{"text": "a", "score": float("nan")}], [{"text": "a", "score": None}]),
        ([{"role": "prompter", "text": "a"}], [{"role": "prompter", "text": "a"}]),
    ],
)
def test_a_json_value_is_a_list_of_rows_or_one(tmp_path, value, rows):
    assert rows_of(tmp_path / "a.json", json.dumps(value)) == rows


def test_messages_line_by_line_are_one_chat(tmp_path):
    assert rows_of(tmp_path / "a.jsonl", "\n".join(map(json.dumps, CHAT))) == [CHAT]


@pytest.mark.parametrize(
    "text",
    [
        "# Title\n[link](x) {curly}",
        "{not json}",
        "[1] A footnote.",
        "[[Wiki]] page",
        "[[1]] [[2]] notes",
        '["Quoted"] text',
        "\ufeffBOM",
    ],
)
def test_text_is_one_row(tmp_path, text):
    assert rows_of(tmp_path / "a.md", text) == [text.removeprefix("\ufeff")]


def test_tables_are_rows(tmp_path):
    rows = [{"question": 'A, "b"\nc?', "answer": "d"}, {"question": "e", "answer": ""}]
    for name, dialect in (("a.csv", "excel"), ("a.TSV", "excel-tab")):
        with (tmp_path / name).open("w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]), dialect=dialect)
            writer.writeheader()
            writer.writerows(rows)
        assert [row for _, row in read_rows(tmp_path / name, is_row)] == rows


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "", "a.txt is empty: give"),
        ("a.parquet", "It rained.", "a.parquet is no Parquet file: repair or replace it"),
        ("a.csv", " \n", "a.csv is empty: give"),
        ("a.json", "[]", "a.json holds no rows: give"),
        ("a.csv", "question,answer\n", "a.csv holds no rows: give"),
        ("a.csv", "text;label\nhi;1\n", "a.csv: its first line separates columns by ';', expected is ','"),
        ("a.csv", "question\tanswer\na\tb\n", r"a.csv: its first line separates columns by '\\t', expected is ','"),
        ("a.tsv", "question,answer\na,b\n", r"a.tsv: its first line separates columns by ',', expected is '\\t'"),
        ("a.csv", "id,text,text\n1,a,b\n", "a.csv: its first line names 'text' twice: give each"),
        ("a.csv", 'text\na\n"b\nc\n', "a.csv, row 2 cannot be read as one of a table .*: close its quotes"),
        ("a.csv", '"text\na\n', "a.csv: its first line cannot be read as that of a table"),
        (
            "a.csv",
            "It rained; we stayed, it rained, we stayed\nIt rained.",
            "a.csv: its first line is .* above a column of texts",
        ),
        ("a.csv", "text\nhi\nHello, you, all\n", "a.csv, row 2 has 3 cells, the first line names 1: put text with ','"),
    ],
)
def test_files_without_rows_and_tables_of_another_kind(tmp_path, name, content, says):
    with pytest.raises(InputError, match=says):
        rows_of(tmp_path / name, content)


def test_a_first_line_that_names_no_columns_is_told_in_short(tmp_path):
    with pytest.raises(InputError) as e:
        rows_of(tmp_path / "a.csv", "It rained and, yes, we stayed " * 400 + "\nIt rained.")
    assert len(str(e.value).removeprefix(str(tmp_path))) < 400


def test_columns_without_a_name_may_be_many(tmp_path):
    assert rows_of(tmp_path / "a.csv", "text,,\na,,\n") == [{"text": "a", "": ""}]


def test_a_table_has_fields_of_any_length(tmp_path):
    assert rows_of(tmp_path / "a.csv", "text\n" + "a" * 200_000) == [{"text": "a" * 200_000}]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"text": "a"}\n\n{"text": ', "a.txt, line 3: not JSON"),
        ("[" * 100_000, "a.json, line 1: not JSON"),
        ("%PDF-1.7", "a.txt is a PDF: give"),
        (b"PK\x03\x04", "a.txt is a zip archive or an office document"),
        ("text".encode("utf-16"), "a.txt is UTF-16 text: convert it"),
        ("text".encode("utf-32"), "a.txt is UTF-32 text: convert it"),
        ("text".encode("utf-16-le"), "a.txt holds bytes of zero, as programs do and UTF-16 text without a mark: give"),
        (b"\x7fELF\2\1\1\0", "a.txt holds bytes of zero"),
    ],
)
def test_what_is_not_read_is_told(tmp_path, content, says):
    name = "a.json" if isinstance(content, str) and content.startswith("[[") else "a.txt"
    with pytest.raises(InputError, match=says):
        rows_of(tmp_path / name, content)


def test_a_misspelled_file(tmp_path):
    (tmp_path / "chats.jsonl").write_text("")
    with pytest.raises(InputError, match=r"there is no such file \(did you mean chats.jsonl\?\): give"):
        read_rows(tmp_path / "chat.jsonl", is_row)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(values=st.lists(JSON, min_size=2, max_size=5), indent=st.sampled_from([None, 1]))
def test_values_one_after_another_are_the_rows(tmp_path_factory, values, indent):
    file = tmp_path_factory.getbasetemp() / "values.jsonl"
    assert rows_of(file, "\n".join(json.dumps(v, indent=indent) for v in values)) == values

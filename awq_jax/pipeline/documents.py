"""Files of people as rows: JSON, JSON lines, tables or plain text, told apart by what is in them and by their name."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from awq_jax.errors import InputError, reading
from awq_jax.files import regular
from awq_jax.near import did_you_mean, names_in

Row = tuple[str, Any]
"""Where it stands, "line 3", and the row: a text, or what JSON holds."""

FORMATS = "a text, .json, .jsonl, .csv or .parquet file"
JSON = (".json", ".jsonl", ".ndjson", ".jsonlines")
TABLES = {".csv": ",", ".tsv": "\t"}
SEPARATORS = (",", ";", "\t", "|")
SUFFIXES = (".txt", ".md", ".gz", ".parquet", *JSON, *TABLES)
"""By which a name is that of a file, there or not."""
STARTS_AS_JSON = re.compile(r'\s*(\{\s*["}]|\[\s*[\[{"\]])')
HOLDS_OBJECTS = re.compile(r'[\[\s]*\{\s*"')
BLANK = re.compile(r"[ \t\r\n]*")
TOLD = {
    b"\x1f\x8b": "is compressed: unpack it first, with gunzip",
    b"PK\x03\x04": f"is a zip archive or an office document: give {FORMATS}",
    b"%PDF": f"is a PDF: give {FORMATS}",
    # UTF-32 begins as UTF-16 does.
    codecs.BOM_UTF32_LE: "is UTF-32 text: convert it, with iconv -f UTF-32 -t UTF-8",
    codecs.BOM_UTF32_BE: "is UTF-32 text: convert it, with iconv -f UTF-32 -t UTF-8",
    codecs.BOM_UTF16_LE: "is UTF-16 text: convert it, with iconv -f UTF-16 -t UTF-8",
    codecs.BOM_UTF16_BE: "is UTF-16 text: convert it, with iconv -f UTF-16 -t UTF-8",
}
"""First bytes of what is not read -> what to do."""


def check_file(file: Path) -> None:
    """Refuse what cannot hold a row, before it is read: a folder, a pipe, an empty file, one that is not there."""
    if file.is_dir():
        raise InputError(f"{file} is a folder: give {FORMATS}.")
    if not file.exists():
        near = did_you_mean(file.name, names_in(file.parent))
        raise InputError(f"{file}: there is no such file{near}: give {FORMATS}.")
    if not regular(file).stat().st_size:
        raise InputError(f"{file} is empty: give {FORMATS}, with text in it.")


def read_rows(file: Path, is_row: Callable[[Any], bool]) -> list[Row]:
    """The rows of a file, one or more; plain text is one row.

    Args:
      is_row: whether a JSON object is a row by itself; another one that holds one list stands for the list.

    Raises:
      InputError: a file that cannot be read, that is empty, or whose JSON or table is damaged.
    """
    check_file(file)
    raw = file.read_bytes()
    is_parquet = raw[:4] == b"PAR1"
    if file.suffix.lower() == ".parquet" and not is_parquet:
        raise InputError(f"{file} is no Parquet file: repair or replace it, or give it the ending of what it is.")
    if not (rows := parquet(file) if is_parquet else rows_of(file, raw, is_row)):
        raise InputError(f"{file} {'holds no rows' if raw.strip() else 'is empty'}: give {FORMATS}, with text in it.")
    return rows


def rows_of(file: Path, raw: bytes, is_row: Callable[[Any], bool]) -> list[Row]:
    """The rows of what is in a file."""
    if found := next((advice for start, advice in TOLD.items() if raw.startswith(start)), None):
        raise InputError(f"{file} {found}.")
    if b"\0" in raw:
        raise InputError(
            f"{file} holds bytes of zero, as programs do and UTF-16 text without a mark: give {FORMATS}, such text "
            "converted with iconv -f UTF-16LE -t UTF-8."
        )
    with reading(f"{file} is not UTF-8 text", f"give {FORMATS}"):
        text = raw.decode("utf-8-sig")
    if (suffix := file.suffix.lower()) in TABLES:
        return list(table(file, text, TABLES[suffix], is_row))
    if suffix in JSON or STARTS_AS_JSON.match(text):
        try:
            return unwrapped(list(json_values(file, text)), is_row)
        except InputError:
            # A text may start with a bracket too, as [[links]] of a wiki do.
            if suffix in JSON or HOLDS_OBJECTS.match(text):
                raise
    return [("", text)] if text.strip() else []


def table(file: Path, text: str, separator: str, is_row: Callable[[Any], bool]) -> Iterator[Row]:
    """The rows of a table whose first line names its columns."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    # Strict: a quote that is never closed would make one text of all rows after it.
    found = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    with reading(f"{file}: its first line cannot be read as that of a table", "repair or replace it"):
        names = list(found.fieldnames or [])
    check_names(file, names, separator, is_row)
    for k in count(1):
        with reading(f"{file}, row {k} cannot be read as one of a table", "close its quotes, double those in a text"):
            row = next(found, None)
        if row is None:
            return
        if more := row.get(None):  # type: ignore[call-overload]
            raise InputError(
                f"{file}, row {k} has {len(names) + len(more)} cells, the first line names {len(names)}: put text "
                f"with {separator!r} in it into double quotes."
            )
        yield f"row {k}", row


def check_names(file: Path, names: list[str], separator: str, is_row: Callable[[Any], bool]) -> None:
    """Refuse a first line that names no columns of texts or chats, or one of them twice."""
    named = lambda names: is_row(dict.fromkeys(names, ""))
    if not any(map(str.strip, names)):
        return
    if named(names):
        if twice := [name for name, n in Counter(names).items() if n > 1 and name.strip()]:
            raise InputError(
                f"{file}: its first line names {reprlib.repr(twice[0])} twice: give each column its own name."
            )
        return
    if other := next((s for s in SEPARATORS if len(names) == 1 and named(names[0].split(s))), None):
        raise InputError(
            f"{file}: its first line separates columns by {other!r}, expected is {separator!r}: save it with "
            f"{separator!r} between columns."
        )
    raise InputError(
        f"{file}: its first line is {reprlib.repr(names)}, expected are names of columns: put text above a column of "
        "texts, prompt and completion above questions and their answers."
    )


def json_values(file: Path, text: str) -> Iterator[Row]:
    """JSON values that follow each other, on lines of their own or not."""
    # NaN and Infinity, which Python writes and JSON does not know, are nothing.
    decoder, at, line = json.JSONDecoder(parse_constant=lambda _: None), 0, 1
    skip = lambda at: BLANK.match(text, at).end()  # type: ignore[union-attr]
    while (start := skip(at)) < len(text):
        line += text.count("\n", at, start)
        where = f"line {line}"
        with reading(f"{file}, {where}: not JSON", "repair or remove it"):
            value, at = decoder.raw_decode(text, start)
        line += text.count("\n", start, at)
        yield where, value


def unwrapped(values: list[Row], is_row: Callable[[Any], bool]) -> list[Row]:
    """The rows of a list, or of an object with one list, that is all of a file; otherwise the values as they are."""
    if len(values) > 1 and all(is_message(value) for _, value in values):
        return [(values[0][0], [value for _, value in values])]
    if len(values) != 1:
        return values
    where, value = values[0]
    if isinstance(value, dict) and not is_row(value):
        lists = [v for v in value.values() if isinstance(v, list)]
        value = lists[0] if len(lists) == 1 else value
    if isinstance(value, list) and not (value and all(map(is_message, value))):
        return [(f"row {k}", row) for k, row in enumerate(value, 1)]
    return [(where, value)]


def is_message(value: Any) -> bool:
    """Whether this is one turn of a chat rather than a row."""
    fields = value.keys() if isinstance(value, dict) else set()
    return {"from", "value"} <= fields or ("role" in fields and bool({"content", "tool_calls"} & fields))


def parquet(file: Path) -> list[Row]:
    try:
        import pyarrow.parquet  # type: ignore[import-not-found]
    except ImportError as e:
        raise InputError(
            f"{file} is a Parquet file: `pip install 'awq-jax[datasets]'` to read it, or convert it to .jsonl."
        ) from e
    with reading(f"{file} cannot be read as Parquet", "repair or replace it"):
        return [(f"row {k}", row) for k, row in enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1)]

"""The snippets of the documentation run as they are, each by itself."""

import re
from pathlib import Path

import pytest
from loose import loose

DOCS = Path(__file__).parents[1] / "docs"
SNIPPETS = [
    pytest.param(code, id=f"{page.stem}-{k}")
    for page in sorted(DOCS.glob("*.md"))
    for k, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL))
]


def test_there_are_snippets():
    assert len(SNIPPETS) >= 8


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippet(code, capsys, tmp_path, monkeypatch, doors):
    monkeypatch.chdir(tmp_path)
    loose(exec)(compile(code, "snippet", "exec"), {"__name__": "snippet"})
    assert "Traceback" not in capsys.readouterr().out
    assert (doors["kernel"] > 0) == bool(re.search(r"^y = |small\(|\.call\(", code, re.MULTILINE))

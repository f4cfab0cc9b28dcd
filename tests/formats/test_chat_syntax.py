"""Chat templates that are broken are told, by a parser that runs nothing of them."""

import json

import pytest
from checkpoints import tokenizer

from awq_jax.formats.chat_syntax import broken_templates

WHOLE = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"


@pytest.mark.parametrize("template", [WHOLE, "plain", "{{ 7 ** (9 ** 12) }}", "{{ a | unknown }}"])
def test_templates_that_are_whole(tmp_path, template):
    (tmp_path / "chat_template.jinja").write_text(template)
    assert broken_templates([tmp_path / "chat_template.jinja"]) == []


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("hi\n{% if %}", "line 2: Expected an expression"),
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("{% generation %}", "line 1: Unexpected end of template"),
        ("{{ messages", "line 1: unexpected end of template"),
        ("(" * 9 + "{{" + "(" * 99999, ""),
    ],
)
def test_templates_that_are_broken(tmp_path, template, says):
    (tmp_path / "chat_template.jinja").write_text(template)
    (said,) = broken_templates([tmp_path / "chat_template.jinja"])
    assert said.startswith(f"The chat template in chat_template.jinja is broken ({says}")
    assert said.endswith("): repair it, it is copied as it is.")


@pytest.mark.parametrize(
    ("found", "broken"),
    [
        (None, 0),
        (WHOLE, 0),
        ([{"name": "default", "template": WHOLE}], 0),
        ("{%", 1),
        ([{"name": "default", "template": WHOLE}, {"name": "tool_use", "template": "{%"}], 1),
        ([{"name": "default"}], 1),
        (7, 1),
    ],
)
def test_templates_in_json(tmp_path, found, broken):
    files = [tmp_path / "tokenizer_config.json", tmp_path / "tokenizer.json"]
    for file in files:
        file.write_text(json.dumps({"chat_template": found}))
    assert len(broken_templates(files)) == broken


def test_what_a_tokenizer_writes_is_whole(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    assert broken_templates(tmp_path.iterdir()) == []

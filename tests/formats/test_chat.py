"""Chat templates are programs of strangers: what they print is taken, what else they do ends with their process."""

import datetime

import pytest
from checkpoints import tokenizer

from awq_jax.errors import InputError
from awq_jax.formats import chat

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def templated():
    found, before = tokenizer(), tokenizer().chat_template
    yield lambda template: setattr(found, "chat_template", template) or found
    found.chat_template = before


def test_many_chats_are_rendered_as_the_tokenizer_does(templated):
    both = [HI, [*HI, {"role": "assistant", "content": "é \ud800", "tool_calls": None}]]
    found = templated(tokenizer().chat_template)
    for start in (False, True):
        expected = [found.apply_chat_template(c, tokenize=False, add_generation_prompt=start) for c in both]
        assert chat.render(found, both, add_generation_prompt=start) == expected
    assert chat.render(found, []) == []


@pytest.mark.parametrize(
    ("bound", "most", "says"),
    [
        ("ALL_LONGEST", 25, "chat 3: .* refuses it: up to here it writes 30 characters"),
        ("ALL_SECONDS", -1, "chat 1: .* refuses it: up to here it takes longer than -1 s"),
    ],
)
def test_all_chats_together_are_bounded(templated, monkeypatch, bound, most, says):
    monkeypatch.setattr(chat, bound, most)
    with pytest.raises(InputError, match=says):
        chat.render(templated("{{ 'a' * 10 }}"), [HI] * 5)


def test_dates_become_text(templated):
    day = datetime.date(2024, 5, 1)
    assert chat.render(templated("{{ messages[0].day }}"), [[HI[0] | {"day": day}]]) == ["2024-05-01"]


def test_chats_with_tools_have_the_template_for_them(templated):
    found = templated({"default": "plain", "tool_use": "{{ tools[0].name }}"})
    assert chat.render(found, [HI, HI], [None, [{"name": "clock"}]]) == ["plain", "clock"]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "first: the model has no chat template: give plain text"),
        ("{{ raise_exception('no system\nrole') }}", "first: the model's chat template refuses it: no system role"),
        ("{{ 1 / 0 }}", "refuses it: division by zero"),
        ("{% if %}", "refuses it: Expected an expression"),
        ("{{ 'a' * 10 ** 10 }}", "refuses it: MemoryError"),
        ("{{ 'a' * 1000 }}", "refuses it: it writes 1000 characters"),
        ("{{ 7 ** (9 ** 12) }}", "takes longer than 0.5 s: repair or remove the template"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes longer than 0.5 s"),
        (7, "first: the model's chat template refuses it: "),
        ({"a": "b"}, "first: the model's chat templates do not serve it: "),
    ],
)
def test_templates_that_fail(templated, monkeypatch, template, says):
    monkeypatch.setattr(chat, "SECONDS", 0.5)
    monkeypatch.setattr(chat, "LONGEST", 999)
    with pytest.raises(InputError) as e:
        chat.render(templated(template), [HI], names=["first"])
    assert says in str(e.value)
    assert "\n" not in str(e.value)

"""The page: whole in itself, nothing of an answer is markup, and no larger than it may be."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored import GREEDY, KINDS, far, known, path, put, said, small

from awq_jax.records.comparison import compared
from awq_jax.records.drawn import heats
from awq_jax.records.gate import judge
from awq_jax.records.marked import along, differences
from awq_jax.records.page import page
from awq_jax.records.prompt import Prompt
from awq_jax.records.store import store

VOID = {"meta", "link", "input"}


class Reader(HTMLParser):
    """All tags with their attributes, and the words; elements must close in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_shows_answers_checks_and_verdicts_and_asks_for_nothing(tmp_path):
    with store(path(tmp_path)) as one:
        base, other, prompts = small(one)
        found = compared(one, prompts, base, [other], [GREEDY])
    html = page(found, judge(found, {"kl": 0.05, "checks": 0}))
    read = Reader(html)
    assert read.open == ["html", "body"]
    text = "".join(read.words)
    for words in (
        "capital",
        "It is Paris.",
        "Lyon",
        "Capital of France?",
        "contains: Paris",
        "beyond the gate",
    ):
        assert words in text
    assert html.count("<details") == 2
    assert ("mark", {"class": "first"}) in read.tags
    cells = [attrs["data-t"] for tag, attrs in read.tags if tag == "td" and "data-t" in attrs]
    assert len(cells) == 28
    assert cells[0].startswith("layers_0/attn/q/kernel: 4 bits, error ")
    asked = [v for _, attrs in read.tags for k, v in attrs.items() if k in ("src", "href")]
    assert all(v.startswith(("#", "data:")) for v in asked)
    assert not re.search(r"https?://|@import|url\(", html)


def test_nothing_that_a_model_or_a_user_wrote_is_markup(tmp_path):
    evil = "<script>alert(1)</script>\"'><img src=x onerror=y>"
    base, other = known("a" + evil), known("b" + evil, error=0.01)
    other = other._replace(sites=[[evil, 4, 0.1, 0.2]])
    prompt = Prompt(evil, evil, (evil,), {"contains": evil})
    with store(path(tmp_path)) as one:
        for each in (base, other):
            one.meet(each)
        put(one, prompt, base, first := said(evil))
        put(one, prompt, other, said(evil[::-1]), base, far(first, 9))
        found = compared(one, [prompt], base, [other], [GREEDY])
    tags = [tag for tag, _ in Reader(page(found, judge(found, {"kl": 0.1}))).tags]
    assert tags.count("script") == 2
    assert "img" not in tags


def test_a_page_that_would_be_too_large_leaves_out_what_differs_least(tmp_path):
    base, other = known("a"), known("b")
    prompts = [Prompt(f"prompt {k}", f"q{k}") for k in range(12)]
    with store(path(tmp_path)) as one:
        for k, prompt in enumerate(prompts):
            put(one, prompt, base, first := said(f"answer {k} " + "word " * 400))
            put(one, prompt, other, said(f"other {k} " + "word " * 400), base, far(first, 0.1 * k))
        found = compared(one, prompts, base, [other], [GREEDY])
    whole, less = page(found), page(found, largest=400_000)
    assert len(whole) > 400_000 >= len(less.encode())
    assert "answer 11 " in less
    assert "answer 0 " not in less
    assert re.search(r"answers to the \d+ prompts that differ least are not on it", less)
    assert less.count("<details") == 12


def test_what_was_never_asked_or_answered_with_nothing_is_said(tmp_path):
    base, other, prompts = known("a"), known("b"), [Prompt("p", "q"), Prompt("r", "s")]
    with store(path(tmp_path)) as one:
        put(one, prompts[0], base, said("Hi."))
        put(one, prompts[1], base, first := said(""))
        put(one, prompts[1], other, said(""), base, far(first, 0.1))
        html = page(compared(one, prompts, base, [other], [GREEDY]))
    assert "never asked" in html
    assert html.count("an empty answer") == 2


words = st.text(st.sampled_from("ab .é\n\ud83d"), max_size=30)


@given(words, words)
def test_pieces_are_the_whole_answer(base, other):
    found = differences(base, other)
    assert "".join(piece for _, piece in found) == other
    assert (base == other) == all(kind == "same" for kind, _ in found)


@given(st.text(max_size=20), st.booleans(), st.floats(0, 20))
def test_an_answer_along_kl_is_whole(text, stopped, kl):
    answer = said(text, stopped)
    found = along(answer, far(answer, kl)["kl"] if text or stopped else [])
    assert "".join(piece for _, piece, _ in found) == text + (" \u25a0" if stopped else "")


def test_heat_maps_share_a_scale():
    one, two = (type("S", (), {"known": known(n, error=e), "name": n}) for n, e in (("a", 0.001), ("b", 0.1)))
    found = heats([one, two])
    assert [name for name, _ in found["maps"][0]["rows"]] == [*KINDS]
    shades = [[c["shade"] for _, cells in m["rows"] for c in cells.values()] for m in found["maps"]]
    assert (min(shades[0]), max(shades[1])) == (0, 1)
    assert max(shades[0]) < min(shades[1]) + 0.3
    assert heats([type("S", (), {"known": known("c"), "name": "c"})]) is None


@pytest.mark.parametrize("name", ["model.layers.3.mlp.down_proj.weight", "w"])
def test_sites_of_any_name_have_a_place(name):
    side = type("S", (), {"known": known("a")._replace(sites=[[name, 4, 0.1, 0.2]]), "name": "a"})
    assert len(heats([side])["maps"][0]["rows"]) == 1

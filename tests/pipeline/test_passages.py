"""Sources of text as passages: what of a chat counts, and what comes from the hub."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import tokenizer

from awq_jax.errors import InputError
from awq_jax.pipeline.chats import Chat
from awq_jax.pipeline.passages import passages, said
from awq_jax.pipeline.windows import CONVENTIONS, Convention

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello there"},
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Bye"},
]
OWN = Convention()


def counted(passage, words):
    """The runs of tokens that count, in words."""
    edges = np.flatnonzero(np.diff(np.pad(passage.counts.astype(int), 1)))
    return [words.decode(passage.tokens[a:b]) for a, b in edges.reshape(-1, 2)]


def test_of_a_chat_counts_what_the_model_says_and_that_it_ends(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"prompt": "a", "completion": "bc"}))
    found, _ = passages(str(file), tokenizer(), OWN)
    assert [counted(one, tokenizer()) for one in found] == [
        ["Hello there<|im_end|>", "Bye<|im_end|>"],
        ["bc<|im_end|>"],
    ]
    assert [one.nbytes for one in found] == [len("Hello there<|im_end|>Bye<|im_end|>"), len("bc<|im_end|>")]


def test_without_a_template_turns_follow_each_other():
    plain = SimpleNamespace(chat_template=None)
    ((pieces),) = said([Chat(tuple(CHAT[:2]))], plain, ["chat"])
    assert pieces == [("Hi\n\n", False), ("Hello there\n\n", True)]


def test_a_template_that_writes_earlier_turns_otherwise(monkeypatch):
    """As Qwen3's drops what was thought in them."""
    words = tokenizer()
    template = "{% for m in messages %}{% if loop.last %}!{% endif %}{{ m.content }};{% endfor %}"
    monkeypatch.setattr(words, "chat_template", template)
    (pieces,) = said([Chat(tuple(CHAT))], words, ["chat"])
    assert [text for text, counts in pieces if counts] == ["Hello there", "Bye"]
    assert "".join(text for text, _ in pieces) == "Hi;Hello there;Hello there;!Bye;"
    monkeypatch.setattr(words, "chat_template", "nothing of it")
    with pytest.raises(InputError, match=r"chat: the chat template does not write what the model says \('Hello there'"):
        said([Chat(tuple(CHAT))], words, ["chat"])


def test_texts_of_the_hub_by_name_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(*names, **options):
        asked.append((*names, options["split"]))
        return [{"text": " = A = \n"}, {"text": ""}, {"text": " b \n"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    (found,), _ = passages("wikitext-2", tokenizer(), CONVENTIONS["wikitext2"])
    assert tokenizer().decode(found.tokens) == " = A = \n\n\n\n\n b \n"
    passages("some/where:en", tokenizer(), OWN)
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test"), ("some/where", "en", "train")]

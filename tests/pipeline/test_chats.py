"""Rows of all the kinds that data sets have, as chats and as text."""

import copy
import json

import pytest
from checkpoints import tokenizer
from hypothesis import given
from hypothesis import strategies as st
from test_documents import JSON

from awq_jax.pipeline.chats import Chat, NoText, as_chat, as_texts

ASK, TELL = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
SYSTEM = {"role": "system", "content": "Be brief."}
PARTS = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CASES = {
    "a list": ([ASK, TELL], [ASK, TELL]),
    "messages": ({"id": 3, "messages": [ASK, TELL]}, [ASK, TELL]),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}], "system": "Be brief."},
        [SYSTEM, ASK, TELL],
    ),
    "parts": ({"messages": [{"role": "user", "content": PARTS}, TELL]}, [ASK, TELL]),
    "no content": ({"messages": [{"role": "user", "content": None}]}, [{"role": "user", "content": ""}]),
    "Alpaca": ({"instruction": "Who?", "input": "", "output": "Me.", "text": "### Who?"}, [ASK, TELL]),
    "Alpaca with history": (
        {"instruction": "Why?", "output": "So.", "history": [["Who?", "Me."]], "system": "Be brief."},
        [SYSTEM, ASK, TELL, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}],
    ),
    "history as a string": (
        {"prompt": "Why?", "response": "So.", "history": "[['Who?', 'Me.']]"},
        [ASK, TELL, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}],
    ),
    "history of messages": ({"prompt": "Who?", "response": "Me.", "history": [SYSTEM]}, [SYSTEM, ASK, TELL]),
    "no history": ({"prompt": "Who?", "response": "Me.", "history": []}, [ASK, TELL]),
    "Alpaca with input": (
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        [{"role": "user", "content": "Add.\n\n1, 2"}, {"role": "assistant", "content": "3"}],
    ),
    "Dolly": (
        {"instruction": "Who?", "context": "Here.", "response": "Me.", "category": "qa"},
        [{"role": "user", "content": "Who?\n\nHere."}, TELL],
    ),
    "prompt, completion": ({"prompt": "Who?", "completion": "Me."}, [ASK, TELL]),
    "both of messages": ({"prompt": [SYSTEM, ASK], "completion": [TELL]}, [SYSTEM, ASK, TELL]),
    "prompt, response": ({"prompt": "Who?", "response": "Me."}, [ASK, TELL]),
    "question, answer": ({"question": "Who?", "answer": "Me."}, [ASK, TELL]),
    "OpenOrca": ({"system_prompt": "Be brief.", "question": "Who?", "response": "Me."}, [SYSTEM, ASK, TELL]),
    "preference": ({"prompt": "Who?", "chosen": "Me.", "rejected": "You."}, [ASK, TELL]),
    "preference of messages": ({"prompt": "Who?", "chosen": [ASK, TELL], "rejected": []}, [ASK, TELL]),
    "preference without prompt": ({"chosen": [ASK, TELL], "rejected": [ASK]}, [ASK, TELL]),
    "messages as JSON": ({"messages": json.dumps([ASK, TELL])}, [ASK, TELL]),
    "messages as Python shows them": ({"conversations": f" {[ASK, TELL]}"}, [ASK, TELL]),
    "both as strings": ({"prompt": json.dumps([SYSTEM, ASK]), "completion": str([TELL])}, [SYSTEM, ASK, TELL]),
    "preference as a string": ({"chosen": str([ASK, TELL]), "rejected": "[]"}, [ASK, TELL]),
    "a list that is no messages": (
        {"prompt": "[1, 2", "completion": "[]"},
        [{"role": "user", "content": "[1, 2"}, {"role": "assistant", "content": "[]"}],
    ),
    "input, output": ({"input": "Who?", "output": "Me."}, [ASK, TELL]),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_that_are_chats(case):
    row, messages = CASES[case]
    assert as_chat(row) == Chat(tuple(messages))


@pytest.mark.parametrize("value", ["Who?", "[{'role': 'user'", "[" * 100_000, "[1]"])
def test_a_field_of_messages_that_holds_none_is_refused(value):
    with pytest.raises(ValueError, match="is no list of messages, nor one as JSON"):
        as_chat({"messages": value})


@pytest.mark.parametrize("history", [7, ["Who?"], [["Who?"]]])
def test_a_history_of_something_else_is_refused(history):
    with pytest.raises(ValueError, match="no list of questions with their answers"):
        as_chat({"prompt": "Who?", "response": "Me.", "history": history})


@pytest.mark.parametrize("row", ["a", {"text": "a", "url": "b"}, {"content": "a"}, {"text": "a", "prompt": "b"}])
def test_rows_that_are_texts(row):
    assert as_chat(row) == "a"


def test_tools_and_their_calls_are_objects_whether_or_not_the_row_has_them_as_strings():
    call = {"function": {"name": "look", "arguments": '{"at": "it"}'}, "type": "function"}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    found = as_chat({"messages": [ASK, message], "tools": json.dumps([TOOL])})
    assert found == Chat((ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}), [TOOL])
    assert as_chat({"messages": [ASK], "tools": "[]"}) == as_chat({"messages": [ASK], "tools": None}) == Chat((ASK,))


def test_rejected_answers_are_left_out_and_told():
    rows = [{"chosen": [ASK, TELL], "rejected": [ASK]}, {"prompt": "Who?", "chosen": "Me.", "rejected": "You."}, "text"]
    assert "2 rejected answers left out" in as_texts([("", row) for row in rows], tokenizer(), "a.json").notes


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": [{"role": "user", "content": [*PARTS, {"type": "image"}]}]}, "a part 'image'"),
        ({"messages": [{"role": "user", "content": json.dumps([*PARTS, {"type": "image"}])}]}, "a part 'image'"),
        ({"messages": [ASK], "images": ["x.png"]}, "an image"),
    ],
)
def test_images_are_left_out_and_told(row, what):
    with pytest.raises(NoText, match=what):
        as_chat(row)
    found = as_texts([("row 1", row), ("row 2", "text"), ("row 3", row)], tokenizer(), "a.json")
    assert (found.texts, found.chats, found.notes) == (["text"], 0, (f"2 rows with {what} left out",))


def words(value):
    """All strings of a JSON value but the keys."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [word for part in inner for word in words(part)]


FIELDS = st.sampled_from(
    ["messages", "prompt", "output", "text", "content", "role", "from", "value", "chosen", "input"]
)


@given(row=st.dictionaries(FIELDS, JSON, max_size=4) | st.lists(st.dictionaries(FIELDS, JSON, max_size=3), max_size=3))
def test_whatever_a_row_holds_it_is_words_of_it_or_refused(row):
    """Nothing of JSON's own, such as a brace, gets into a text; nothing but a ValueError comes of it."""
    try:
        found = as_chat(row)
    except ValueError:
        return
    texts = [found] if isinstance(found, str) else [m["content"] for m in found.messages]
    left = "".join(texts).replace("\n\n", "")
    assert set(left) <= set("".join(words(row)))


def through(template, *rows):
    model = copy.deepcopy(tokenizer())
    model.chat_template = template
    return as_texts([(f"row {k}", row) for k, row in enumerate(rows)], model, "a.json")


PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN,
        "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    ],
    ids=["refused", "dropped"],
)
def test_a_system_role_that_the_template_lacks_goes_into_the_first_turn(template):
    found = through(template, [SYSTEM, ASK, TELL], [ASK, TELL], [SYSTEM])
    assert found.texts == ["<user>Be brief.\n\nWho?<assistant>Me.", "<user>Who?<assistant>Me.", "<user>Be brief."]
    assert found.notes == ("the chat template has no system role: its text stands in the first user turn",)


def test_what_the_template_does_not_write_is_told():
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    chat = {"messages": [ASK, call, {"role": "tool", "content": "It is."}], "tools": [TOOL]}
    found = through("{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}", chat, chat, [ASK, TELL])
    assert found.texts == ["Who?", "Who?", "Who?Me."]
    what = ("the tool's turns", "the tools", "tool calls")
    assert found.notes == tuple(f"the chat template leaves out or changes {w} in 2 chats" for w in what)
    taken = through("{{ tools | tojson }}" + PLAIN + "{{ messages[1].tool_calls | tojson }}", chat)
    assert taken.notes == ()
    assert json.dumps([TOOL]) in taken.texts[0]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_that_is_left_out_is_told(field):
    chat = [ASK, TELL | {field: "One who asks."}]
    told = "the chat template leaves out or changes reasoning in 1 chats"
    assert told in through(PLAIN, chat).notes
    assert through(PLAIN + "{{ messages[1]." + field + " }}", chat).notes == ()
    assert through(None, {"messages": chat, "tools": [TOOL]}).notes[1:] == (
        "left out reasoning in 1 chats",
        "left out the tools in 1 chats",
    )


def test_without_a_template_turns_follow_each_other():
    found = through(None, [ASK, TELL], "text")
    assert (found.texts, found.chats) == (["Who?\n\nMe.", "text"], 1)
    assert found.notes == ("the model has no chat template, so turns just follow each other",)

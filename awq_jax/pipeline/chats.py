"""Rows of data sets as texts: the fields that people use, as chats, and those through a model's chat template."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from awq_jax.errors import InputError
from awq_jax.formats.chat import render
from awq_jax.pipeline.documents import Row, is_message
from awq_jax.pipeline.shown import is_data, shown

CHATS = ("messages", "conversations", "conversation", "chosen")
ASKED = ("instruction", "prompt", "question", "query", "problem", "input")
CONTEXT = ("input", "context")
"""Fields that follow the question in the user's turn."""
ANSWERED = ("output", "completion", "response", "answer", "chosen", "solution")
SYSTEM = ("system", "system_prompt")
TEXTS = ("text", "content", "chosen")
IMAGES = ("image", "images")
PARTS = ("text", "image", "image_url", "input_audio", "audio", "video")
"""Types of parts of a message."""
REASONS = ("reasoning_content", "reasoning", "thinking")
"""Fields of what the model thought before it answered."""
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "function_call": "assistant", "observation": "tool"}
"""What ShareGPT calls them -> what chat templates do."""
KNOWN = '{"messages": [...]}, {"text": "..."} or a question and its answer ({"prompt": ..., "completion": ...})'
BETWEEN = "\n\n"
"""Stands between turns where there is no chat template."""
PROBE = "Answer in words of one syllable."


Fields = Mapping[str, Any]
Turns = tuple[Mapping[str, Any], ...]


class NoText(ValueError):
    """A row that holds something besides text; says what."""


@dataclass(frozen=True)
class Chat:
    """Messages as a chat template takes them, and the tools that it may be told."""

    messages: Turns
    tools: Sequence[Any] | None = None


@dataclass(frozen=True)
class Texts:
    """The texts of some rows, how many of them were chats, and what else there is to say of them."""

    texts: list[str]
    chats: int
    notes: tuple[str, ...]

    def named(self, source: str) -> str:
        """What to call them in an error: the source, and what there is to say."""
        return f"{source} ({'; '.join(self.notes)})" if self.notes else source


def is_row(value: Mapping[str, Any]) -> bool:
    """Whether a JSON object is a row by itself: it has the fields of a chat, or text in those of a text."""
    pair = any(field in value for field in ASKED) and any(field in value for field in ANSWERED)
    return pair or any(f in value for f in CHATS) or any(isinstance(value.get(f), str) for f in TEXTS)


def as_chat(row: Any) -> str | Chat:
    """A row as a text or a chat: as the first of KINDS that it is.

    Raises:
      ValueError: fields that are not known, or not of text.
      NoText: it holds an image or the like.
    """
    if isinstance(row, str):
        return row
    fields = {"messages": row} if isinstance(row, list) else row
    if not isinstance(fields, dict):
        raise ValueError(f"found {reprlib.repr(row)}")
    if any(fields.get(field) for field in IMAGES):
        raise NoText("an image")
    read = fields | {field: listed(fields[field], is_message) for field in fields.keys() & {*CHATS, *ASKED, *ANSWERED}}
    found = next((found for kind in KINDS if (found := kind(read)) is not None), None)
    if found is None:
        null = [field for field, held in fields.items() if held is None]
        nothing = f", with nothing in {null[0]}" if null else ""
        raise ValueError(f"found the fields {reprlib.repr(sorted(map(str, row)))}{nothing}")
    if isinstance(found, str):
        return found
    return Chat((*system(read, found), *found), parsed(read.get("tools")) or None)


def messages(row: Fields) -> Turns | None:
    """{"messages": [...]}, ShareGPT's {"conversations": [...]}."""
    _, found = first(row, CHATS[:-1])
    if isinstance(found, str):
        raise ValueError(f"{reprlib.repr(found)} is no list of messages, nor one as JSON")
    return None if found is None else turns(found, "user")


def preference(row: Fields) -> Turns | None:
    """{"chosen": [...], "rejected": [...]} without a prompt."""
    alone = isinstance(row.get("chosen"), list) and first(row, ASKED) == (None, None)
    return turns(row["chosen"], "user") if alone else None


def pair(row: Fields) -> Turns | None:
    """A question and its answer, Alpaca's {"instruction": ..., "input": ..., "output": ...}, after earlier ones."""
    (asked, question), (_, answer) = first(row, ASKED), first(row, ANSWERED)
    if question is None or answer is None:
        return None
    if isinstance(question, str):
        context = [row[f] for f in CONTEXT if f != asked and isinstance(row.get(f), str) and row[f].strip()]
        question = "\n\n".join([question, *context])
    answered = turns(answer, "assistant")
    # What was chosen may hold the question too.
    if answered and answered[0]["role"] != "assistant":
        return answered
    return (*earlier(row.get("history")), *turns(question, "user"), *answered)


def text(row: Fields) -> str | None:
    """{"text": "..."}."""
    _, found = first(row, TEXTS)
    return found if isinstance(found, str) else None


KINDS: tuple[Callable[[Fields], str | Turns | None], ...] = (messages, preference, pair, text)
"""Of rows, each a function to the turns or the text of a row that is of that kind."""


def first(row: Fields, fields: Iterable[str]) -> tuple[str | None, Any]:
    """The first of some fields that a row has, and what is in it."""
    return next(((f, row[f]) for f in fields if row.get(f) is not None), (None, None))


def system(row: Fields, found: Turns) -> Turns:
    """The system turn that stands in a field of its own, where the turns begin with none."""
    _, said = first(row, SYSTEM)
    has = isinstance(said, str) and said.strip() and not (found and found[0]["role"] == "system")
    return ({"role": "system", "content": said},) if has else ()


def earlier(history: Any) -> Turns:
    """The turns before a question: pairs of one and its answer, or messages."""
    found = (shown(history) if isinstance(history, str) else history) or []
    if isinstance(found, list) and all(map(is_message, found)):
        return turns(found, "user")
    if not isinstance(found, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in found):
        raise ValueError(f"history is {reprlib.repr(history)}, no list of questions with their answers")
    return tuple(turn for asked, answer in found for turn in (*turns(asked, "user"), *turns(answer, "assistant")))


def listed(value: Any, is_one: Callable[[Any], bool]) -> Any:
    """The list that a string holds as JSON, or as Python shows it, if it is one of such; anything else as it is."""
    found = shown(value) if isinstance(value, str) and value.lstrip().startswith("[") else None
    return found if isinstance(found, list) and all(map(is_one, found)) else value


def turns(value: Any, role: str) -> Turns:
    """A text as one turn of `role`, a list of messages as it is."""
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    if not isinstance(value, list):
        raise ValueError(f"{reprlib.repr(value)} is neither a text nor a list of messages")
    return tuple(map(turn, value))


def turn(message: Any) -> dict[str, Any]:
    """A message with its role and content by the names that templates know."""
    role = isinstance(message, dict) and (message.get("role") or message.get("from"))
    if not isinstance(role, str):
        raise ValueError('a message is not {"role": ..., "content": ...}')
    if not any(name in message for name in ("content", "value", "tool_calls", "function_call")):
        raise ValueError(f"a message of {role} has no content")
    content = listed(message.get("content", message.get("value")), is_part)
    kept = {key: value for key, value in message.items() if key not in ("from", "value") and value is not None}
    if calls := message.get("tool_calls"):
        kept["tool_calls"] = [called(call) for call in calls]
    return kept | {"role": ROLES.get(role, role), "content": plain(content)}


def plain(content: Any) -> str:
    """The text of a message's content, which may come in parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"the content {reprlib.repr(content)} is neither a text nor a list of parts")
    return "".join(map(part, content))


def is_part(value: Any) -> bool:
    """Whether this is a part of a message's content."""
    return isinstance(value, dict) and value.get("type") in PARTS and (value["type"] != "text" or "text" in value)


def part(found: Any) -> str:
    if isinstance(found, str):
        return found
    if isinstance(found, dict) and isinstance(found.get("text"), str):
        return found["text"]
    raise NoText(f"a part {found.get('type')!r}" if isinstance(found, dict) else "a part that is no text")


def called(call: Any) -> Any:
    """A tool call with its arguments as an object: templates write them as JSON themselves."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise ValueError('a tool call is not {"function": {"name": ..., "arguments": ...}}')
    function = function | {"arguments": parsed(function.get("arguments", {}))}
    return call | {"function": function} if "function" in call else function


def parsed(value: Any) -> Any:
    """What is JSON in a string, as many data sets store tools; other strings as they are."""
    try:
        return json.loads(value) if isinstance(value, str) and value.strip() else value
    except ValueError:
        return value


def check_words(found: str | Chat) -> None:
    """Refuse a text that is data. Turns of a chat may be JSON, which many answer in, yet not messages themselves."""
    texts = [found] if isinstance(found, str) else [m["content"] for m in found.messages]
    amiss = is_data if isinstance(found, str) else lambda content: listed(content, is_message) is not content
    if odd := next(filter(amiss, texts), None):
        raise ValueError(
            f"{reprlib.repr(odd)} is JSON, or what Python shows of objects, and no words: put the words there, "
            "or the object itself as the row"
        )


def as_texts(rows: Iterable[Row], tokenizer: Any, source: str) -> Texts:
    """The text of every row, chats through the chat template.

    Raises:
      InputError: a row that is neither text nor chat, or a chat that the template refuses; says which.
    """
    found, left_out = found_in(rows, source)
    texts = [row if isinstance(row, str) else "" for _, row in found]
    chats = {k: row for k, (_, row) in enumerate(found) if isinstance(row, Chat)}
    written, notes = through_template(list(chats.values()), tokenizer, [found[k][0] for k in chats])
    for k, text in zip(chats, written, strict=True):
        texts[k] = text
    return Texts(texts, len(chats), (*left_out, *notes))


def found_in(rows: Iterable[Row], source: str) -> tuple[list[tuple[str, str | Chat]], tuple[str, ...]]:
    """The texts and chats of rows, each with where it stands; and what was left out.

    Raises:
      InputError: a row that is neither text nor chat; says which.
    """
    kept: list[tuple[str, str | Chat]] = []
    left_out: Counter[str] = Counter()
    for where, row in rows:
        name = ", ".join(filter(None, (source, where)))
        try:
            found = as_chat(row)
            check_words(found)
        except NoText as e:
            left_out[f"rows with {e} left out"] += 1
            continue
        except (ValueError, TypeError) as e:
            raise InputError(f"{name}: expected {KNOWN}: {e}") from e
        if isinstance(row, dict) and row.get("rejected"):
            left_out["rejected answers left out"] += 1
        kept.append((name, found))
    return kept, tuple(f"{n:,} {what}" for what, n in left_out.items())


def through_template(chats: list[Chat], tokenizer: Any, names: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The text of each chat, and what the template did not take."""
    if not chats:
        return [], ()
    notes: list[str] = []
    told = "the chat template leaves out or changes"
    if not tokenizer.chat_template:
        texts = [BETWEEN.join(filter(None, (m["content"] for m in chat.messages))) for chat in chats]
        notes, told = ["the model has no chat template, so turns just follow each other"], "left out"
    else:
        chats, notes = with_system(chats, tokenizer)
        texts = render(tokenizer, [c.messages for c in chats], [c.tools for c in chats], names=names)
    lost = Counter(what for chat, text in zip(chats, texts, strict=True) for what in set(lacking(chat, text)))
    notes += [f"{told} {what} in {n:,} chats" for what, n in sorted(lost.items())]
    return texts, tuple(notes)


def with_system(chats: list[Chat], tokenizer: Any) -> tuple[list[Chat], list[str]]:
    """Chats as the template takes them, and what that changed: where it has no system role the first turn says it."""
    if not any(m["role"] == "system" for chat in chats for m in chat.messages) or takes_system(tokenizer):
        return chats, []
    moved = [replace(chat, messages=system_in_first_turn(chat.messages)) for chat in chats]
    return moved, ["the chat template has no system role: its text stands in the first user turn"]


def takes_system(tokenizer: Any) -> bool:
    """Whether the chat template writes a system turn, neither refusing nor dropping it."""
    try:
        messages = [{"role": "system", "content": PROBE}, {"role": "user", "content": "Hello."}]
        return PROBE in render(tokenizer, [messages])[0]
    except InputError:
        return False


def system_in_first_turn(messages: Turns) -> Turns:
    """The system turn that a chat begins with as the beginning of the user's first turn."""
    if not messages or messages[0]["role"] != "system":
        return messages
    system, *rest = messages
    if rest and rest[0]["role"] == "user":
        return ({**rest[0], "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:])
    return ({"role": "user", "content": system["content"]}, *rest)


def lacking(chat: Chat, text: str) -> Iterable[str]:
    """What of a chat is not in its text."""
    for m in chat.messages:
        if m["content"].strip() not in text:
            yield f"the {m['role']}'s turns"
        if any(isinstance(m.get(f), str) and m[f].strip() not in text for f in REASONS):
            yield "reasoning"
        if any(name_of(call) not in text for call in m.get("tool_calls", ())):
            yield "tool calls"
    if any(name_of(tool) not in text for tool in chat.tools or ()):
        yield "the tools"


def name_of(tool: Any) -> str:
    """Of a tool or a call of it."""
    return str(tool.get("function", tool).get("name", "")) if isinstance(tool, Mapping) else str(tool)

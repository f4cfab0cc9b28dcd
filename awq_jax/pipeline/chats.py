"""Rows of data sets as texts: the fields that people use, as chats, and those through a model's chat template."""

from __future__ import annotations

import ast
import json
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from awq_jax.errors import InputError
from awq_jax.formats.chat import render
from awq_jax.pipeline.documents import Row, is_message

CHATS = ("messages", "conversations", "conversation", "chosen")
ASKED = ("instruction", "prompt", "question", "query", "problem", "input")
CONTEXT = ("input", "context")
"""Fields that follow the question in the user's turn."""
ANSWERED = ("output", "completion", "response", "answer", "chosen", "solution")
SYSTEM = ("system", "system_prompt")
TEXTS = ("text", "content", "chosen")
IMAGES = ("image", "images")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "function_call": "assistant", "observation": "tool"}
"""What ShareGPT calls them -> what chat templates do."""
KNOWN = '{"messages": [...]}, {"text": "..."} or a question and its answer ({"prompt": ..., "completion": ...})'
PROBE = "Answer in words of one syllable."


class NoText(ValueError):
    """A row that holds something besides text; says what."""


@dataclass(frozen=True)
class Chat:
    """Messages as a chat template takes them, and the tools that it may be told."""

    messages: tuple[Mapping[str, Any], ...]
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
    """A row as a text or a chat.

    Raises:
      ValueError: fields that are not known, or not of text.
      NoText: it holds an image or the like.
    """
    if isinstance(row, str):
        return row
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise ValueError(f"found {reprlib.repr(row)}")
    if any(row.get(field) for field in IMAGES):
        raise NoText("an image")
    row = row | {field: listed(row[field]) for field in row.keys() & {*CHATS, *ASKED, *ANSWERED}}
    first = lambda fields: next(((f, row[f]) for f in fields if row.get(f) is not None), (None, None))
    asked, question = first(ASKED)
    _, answer = first(ANSWERED)
    _, chat = first(CHATS[:-1])
    if chat is None and asked is None and isinstance(row.get("chosen"), list):
        chat = row["chosen"]
    if isinstance(chat, str):
        raise ValueError(f"{reprlib.repr(chat)} is no list of messages, nor one as JSON")
    if chat is not None:
        found = turns(chat, "user")
    elif asked is not None and answer is not None:
        context = [row[f] for f in CONTEXT if f != asked and isinstance(row.get(f), str) and row[f].strip()]
        if isinstance(question, str):
            question = "\n\n".join([question, *context])
        found = turns(answer, "assistant")
        # What was chosen may hold the question too.
        if found and found[0]["role"] == "assistant":
            found = (*turns(question, "user"), *found)
    else:
        _, text = first(TEXTS)
        if not isinstance(text, str):
            raise ValueError(f"found the fields {sorted(map(str, row))}")
        return text
    _, system = first(SYSTEM)
    if isinstance(system, str) and system.strip() and not (found and found[0]["role"] == "system"):
        found = ({"role": "system", "content": system}, *found)
    return Chat(found, parsed(row.get("tools")) or None)


def listed(value: Any) -> Any:
    """The messages that a string holds as JSON, or as Python shows them; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                found = parse(value.strip())
                if isinstance(found, list) and found and all(map(is_message, found)):
                    return found
    return value


def turns(value: Any, role: str) -> tuple[dict[str, Any], ...]:
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
    content = message.get("content", message.get("value"))
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


def as_texts(rows: Iterable[Row], tokenizer: Any, source: str) -> Texts:
    """The text of every row, chats through the chat template.

    Raises:
      InputError: a row that is neither text nor chat, or a chat that the template refuses; says which.
    """
    texts: list[str] = []
    chats: dict[int, Chat] = {}
    names: list[str] = []
    left_out: Counter[str] = Counter()
    for where, row in rows:
        name = ", ".join(filter(None, (source, where)))
        try:
            found = as_chat(row)
        except NoText as e:
            left_out[f"rows with {e} left out"] += 1
            continue
        except (ValueError, TypeError) as e:
            raise InputError(f"{name}: expected {KNOWN}: {e}") from e
        if isinstance(found, Chat):
            chats[len(texts)] = found
            names.append(name)
        texts.append(found if isinstance(found, str) else "")
    written, notes = through_template(list(chats.values()), tokenizer, names)
    for k, text in zip(chats, written, strict=True):
        texts[k] = text
    return Texts(texts, len(chats), (*(f"{n:,} {what}" for what, n in left_out.items()), *notes))


def through_template(chats: list[Chat], tokenizer: Any, names: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The text of each chat, and what the template did not take."""
    if not chats:
        return [], ()
    if not tokenizer.chat_template:
        texts = ["\n\n".join(filter(None, (m["content"] for m in chat.messages))) for chat in chats]
        return texts, ("the model has no chat template, so turns just follow each other",)
    notes = []
    if any(m["role"] == "system" for chat in chats for m in chat.messages) and not takes_system(tokenizer):
        chats = [replace(chat, messages=system_in_first_turn(chat.messages)) for chat in chats]
        notes.append("the chat template has no system role: its text stands in the first user turn")
    texts = render(tokenizer, [c.messages for c in chats], [c.tools for c in chats], names=names)
    lost = Counter(what for chat, text in zip(chats, texts, strict=True) for what in set(lacking(chat, text)))
    notes += [f"the chat template leaves out or changes {what} in {n:,} chats" for what, n in sorted(lost.items())]
    return texts, tuple(notes)


def takes_system(tokenizer: Any) -> bool:
    """Whether the chat template writes a system turn, neither refusing nor dropping it."""
    try:
        messages = [{"role": "system", "content": PROBE}, {"role": "user", "content": "Hello."}]
        return PROBE in render(tokenizer, [messages])[0]
    except InputError:
        return False


def system_in_first_turn(messages: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """The system turn that a chat begins with as the beginning of the user's first turn."""
    if not messages or messages[0]["role"] != "system":
        return tuple(messages)
    system, *rest = messages
    if rest and rest[0]["role"] == "user":
        return ({**rest[0], "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:])
    return ({"role": "user", "content": system["content"]}, *rest)


def lacking(chat: Chat, text: str) -> Iterable[str]:
    """What of a chat is not in its text."""
    for m in chat.messages:
        if m["content"].strip() not in text:
            yield f"the {m['role']}'s turns"
        if any(name_of(call) not in text for call in m.get("tool_calls", ())):
            yield "tool calls"
    if any(name_of(tool) not in text for tool in chat.tools or ()):
        yield "the tools"


def name_of(tool: Any) -> str:
    """Of a tool or a call of it."""
    return str(tool.get("function", tool).get("name", "")) if isinstance(tool, Mapping) else str(tool)

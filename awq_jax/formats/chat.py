"""Chats as text, by the template that comes with a tokenizer: a stranger's program, so it runs in a process apart.

transformers' sandbox keeps a template from the machine, not from looping for ever or taking all memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from awq_jax.errors import InputError, one_line
from awq_jax.formats import chat_process

SECONDS = 5.0
"""That the template may take for one chat."""
LONGEST = 10_000_000
"""Characters that it may write for one chat."""
ALL_SECONDS = 600.0
ALL_LONGEST = 1_000_000_000
"""The same for all chats together."""


def render(
    tokenizer: Any,
    chats: Sequence[Sequence[Mapping[str, Any]]],
    tools: Sequence[Sequence[Any] | None] | None = None,
    *,
    add_generation_prompt: bool = False,
    names: Sequence[str] | None = None,
) -> list[str]:
    """The text of each chat, as the tokenizer's chat template has it.

    One process renders all of them and takes two seconds to start, so give many at once.

    Args:
      tokenizer: of transformers.
      chats: messages, {"role": ..., "content": ...}; fields that are None are left out, what JSON cannot hold, such
        as a date, becomes text.
      tools: of each chat, JSON schemas or None.
      add_generation_prompt: let the text end where the answer begins.
      names: what each chat is called in errors; "chat 1" and so on without.

    Raises:
      InputError: no template; one that fails, or takes longer or writes more than it may; all name the chat.
    """
    if not chats:
        return []
    tools = [None] * len(chats) if tools is None else tools
    names = [f"chat {k}" for k in range(1, len(chats) + 1)] if names is None else names
    if not tokenizer.chat_template:
        raise InputError(f"{names[0]}: the model has no chat template: give plain text, or another model.")
    kinds = {"tools" if given else "plain": given for given in tools}
    try:
        templates = {kind: tokenizer.get_chat_template(tools=given) for kind, given in kinds.items()}
    except ValueError as e:
        raise InputError(f"{names[0]}: the model's chat templates do not serve it: {one_line(e)}") from e
    asked = {
        "seconds": SECONDS,
        "longest": LONGEST,
        "all_seconds": ALL_SECONDS,
        "all_longest": ALL_LONGEST,
        "templates": templates,
        "options": {**tokenizer.special_tokens_map, "add_generation_prompt": add_generation_prompt},
        "chats": [
            {
                "messages": [{k: v for k, v in message.items() if v is not None} for message in chat],
                "tools": given,
                "template": "tools" if given else "plain",
            }
            for chat, given in zip(chats, tools, strict=True)
        ],
    }
    done = subprocess.run(
        # -P: the modules beside the program are not meant for it.
        [sys.executable, "-P", chat_process.__file__],
        input=json.dumps(asked, default=str),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    texts = [json.loads(line) for line in done.stdout.splitlines()]
    for name, text in zip(names, texts, strict=False):
        if not isinstance(text, str):
            raise InputError(f"{name}: the model's chat template refuses it: {one_line(text['error'])}")
    if len(texts) < len(chats):
        lines = done.stderr.splitlines()
        if any(line.startswith("Timeout") for line in lines):
            reason = f"takes longer than {SECONDS:g} s"
        else:
            reason = f"ended its process ({lines[-1] if lines else done.returncode})"
        raise InputError(f"{names[len(texts)]}: the model's chat template {reason}: repair or remove the template.")
    return texts

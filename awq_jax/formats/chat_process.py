"""The process in which chat templates run: a program that `chat.render` starts, importing nothing of awq_jax.

Reads one JSON object, writes one JSON line a chat: its text, or {"error": ...} and no more. A chat
that takes too long ends the process, whatever it is doing.
"""

import faulthandler
import json
import sys
import time
from pathlib import Path

MEMORY = 1 << 30
"""Bytes that templates may take, where the system can tell what is taken already."""


def limit_memory() -> None:
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        taken = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))


def main() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    asked = json.load(sys.stdin)
    limit_memory()
    end, written = time.monotonic() + asked["all_seconds"], 0
    for chat in asked["chats"]:
        faulthandler.dump_traceback_later(asked["seconds"], exit=True)
        try:
            template = asked["templates"][chat["template"]]
            options = {"tools": chat["tools"], "chat_template": template, **asked["options"]}
            (text,), _ = render_jinja_template([chat["messages"]], **options)
            written += len(text)
            found = text
            if len(text) > asked["longest"]:
                found = {"error": f"it writes {len(text)} characters"}
            elif written > asked["all_longest"]:
                found = {"error": f"up to here it writes {written} characters"}
            elif time.monotonic() > end:
                found = {"error": f"up to here it takes longer than {asked['all_seconds']:g} s"}
        except Exception as e:
            found = {"error": str(e) or type(e).__name__}
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(found), flush=True)
        if not isinstance(found, str):
            break


if __name__ == "__main__":
    main()

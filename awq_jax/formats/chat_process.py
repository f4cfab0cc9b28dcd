"""The process in which chat templates run: a program that `chat.render` starts, importing nothing of awq_jax.

Reads one JSON object, writes one JSON line a chat: its text, or {"error": ...}. A chat that takes too long ends the
process, whatever it is doing.
"""

import faulthandler
import json
import sys
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
    for chat in asked["chats"]:
        faulthandler.dump_traceback_later(asked["seconds"], exit=True)
        try:
            template = asked["templates"][chat["template"]]
            options = {"tools": chat["tools"], "chat_template": template, **asked["options"]}
            (text,), _ = render_jinja_template([chat["messages"]], **options)
            found = text if len(text) <= asked["longest"] else {"error": f"it writes {len(text)} characters"}
        except Exception as e:
            found = {"error": str(e) or type(e).__name__}
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

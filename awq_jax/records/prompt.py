"""A prompt, and by what its words are told from those of another version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """What models are asked.

    Args:
      name: of this prompt in all versions.
      asked: messages of a chat, or a text that is to be continued as it is.
      tags: words to find it by.
      checks: what the answer has to be, by the names of `records.checks.CHECKS`.
    """

    name: str
    asked: tuple[Mapping[str, Any], ...] | str
    tags: tuple[str, ...] = ()
    checks: Mapping[str, Any] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """A hash of what is asked, by which results are kept: other names, tags and checks change no answer."""
        return hashlib.sha256(self.content.encode()).hexdigest()[:16]

    @property
    def content(self) -> str:
        """What is asked, as JSON."""
        return json.dumps(self.asked, sort_keys=True, ensure_ascii=False)

    @property
    def text(self) -> str:
        """What is asked, to read."""
        if isinstance(self.asked, str):
            return self.asked
        if len(self.asked) == 1:
            return self.asked[0]["content"]
        return "\n\n".join(f"{m['role']}: {m['content']}" for m in self.asked)

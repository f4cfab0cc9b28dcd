"""Seconds by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)

    def rest(self, stage: str) -> None:
        """Count for `stage` what was counted for none since the clock was made."""
        uncounted = time.perf_counter() - self.start - sum(self.seconds.values())
        self.seconds[stage] = self.seconds.get(stage, 0.0) + uncounted

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

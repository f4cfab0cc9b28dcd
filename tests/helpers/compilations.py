"""Counts what XLA compiles, so that a test can say how often a function may be compiled."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from jax import monitoring

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextmanager
def compilations() -> Iterator[Counter[str]]:
    """Compilations inside the block, by the name of the jitted function; eager operations count too.

    Example:
      >>> with compilations() as compiled:
      ...     step(x), step(x)
      >>> assert compiled["step"] == 1
    """
    compiled: Counter[str] = Counter()

    def record(event: str, seconds: float, *, fun_name: str = "", **rest) -> None:
        del seconds, rest
        if event == COMPILED:
            compiled[re.sub(r"^\w+\((.*)\)$", r"\1", fun_name)] += 1

    monitoring.register_event_duration_secs_listener(record)
    try:
        yield compiled
    finally:
        monitoring.unregister_event_duration_listener(record)

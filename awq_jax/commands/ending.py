"""How a command ends that did not do what it was asked: one line, and whose fault it was as the exit code."""

from __future__ import annotations

import logging
import os
import sys

import absl.logging

from awq_jax.errors import one_line, out_of_memory

TRACEBACK = "AWQ_JAX_TRACEBACK"
INPUT, FAULT = 2, 1
"""Exit codes: the user can mend it; awq_jax has to be mended."""


def failed(e: BaseException) -> int:
    """The exit code for an error that ended a command; says on the error stream, in one line, what happened.

    Raises:
      BaseException: `e` itself where the user asked for tracebacks.
    """
    if os.environ.get(TRACEBACK):
        raise e
    if isinstance(e, BrokenPipeError):
        # Whoever read the output has gone; what is left in the buffer would fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAULT
    if out_of_memory(e):
        line, code = f"memory ran out ({one_line(e)}): give smaller numbers, or a machine with more of it.", INPUT
    elif isinstance(e, OSError) and e.strerror:
        line, code = f"{'' if e.filename is None else f'{e.filename}: '}{e.strerror}.", INPUT
    elif isinstance(e, ValueError | OSError):
        line, code = one_line(e, 2000), INPUT
    else:
        what = f"{type(e).__name__}: {one_line(e).rstrip('.')}"
        line, code = f"{what}. This is a fault of awq_jax: report what {TRACEBACK}=1 shows.", FAULT
    print("awq-jax:", line, file=sys.stderr)
    return code


def silence_libraries() -> None:
    """Let no library print the traceback of what it raises as well; the line of `failed` says it."""
    absl.logging.set_verbosity(absl.logging.FATAL)  # orbax
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # what orbax does not wait for

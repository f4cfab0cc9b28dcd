"""What is wrong with something the user gave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A file, a name or an option that cannot be used: one sentence with where, what was found and what to do."""


@contextmanager
def reading(fault: str, remedy: str) -> Iterator[None]:
    """Whatever the block raises as an InputError: "<fault> (<what was raised>): <remedy>."

    Stands where foreign files meet parsers and libraries, which may raise anything, Rust's panics included. What the
    operating system refuses stays an OSError, an InputError as it is, and what says that memory ran out.
    """
    try:
        yield
    except BaseException as e:
        # A panic is no Exception, and pyo3 gives no class to name.
        foreign = isinstance(e, Exception) or type(e).__name__ == "PanicException"
        if not foreign or isinstance(e, InputError) or (isinstance(e, OSError) and e.errno is not None):
            raise
        if out_of_memory(e):
            raise
        # 'rope_theta' alone, say, would not tell that it is missing; what libraries define speaks for itself.
        bare = isinstance(e, LookupError | TypeError | AttributeError | ArithmeticError)
        raise InputError(f"{fault} ({type(e).__name__ + ': ' if bare else ''}{one_line(e)}): {remedy}.") from e


def out_of_memory(e: BaseException) -> bool:
    """Whether memory ran out, the machine's or an accelerator's."""
    words = ("resource_exhausted", "out of memory", "bad_alloc")
    return isinstance(e, MemoryError) or (isinstance(e, RuntimeError) and any(word in str(e).lower() for word in words))


def one_line(error: object, most: int = 300) -> str:
    """What an error says, or its type where it says nothing, as one line of at most `most` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]}..."

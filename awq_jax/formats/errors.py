"""What is wrong with something the user gave."""

from __future__ import annotations


class InputError(ValueError):
    """A file, a name or an option that cannot be used: one sentence with where, what was found and what to do."""


def one_line(error: object, most: int = 300) -> str:
    """What an error says, or its type where it says nothing, as one line of at most `most` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]}..."

"""What is shown while something long runs."""

import io
import itertools
import sys

import pytest

from awq_jax.commands import progress


class Stream(io.StringIO):
    """An error stream that is a terminal or not."""

    def __init__(self, terminal=False):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.fixture(autouse=True)
def _terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")


def walk():
    with progress.progress_bar() as told:
        told("loading", 0, 1)
        told("loading", 1, 1)
        for k in range(5):
            told("block", k, 4)


def test_a_terminal_sees_a_bar_that_goes_away(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr := Stream(terminal=True))
    walk()
    assert "loading" in stderr.getvalue()
    assert "4/4" in stderr.getvalue()
    assert stderr.getvalue().endswith("\x1b[2K")


def test_what_is_printed_meanwhile_goes_where_it_was_sent(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(terminal=True))
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    with progress.progress_bar() as told:
        told("block", 1, 2)
        print("a line")
    assert out.getvalue() == "a line\n"


def test_a_log_has_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr := Stream())
    seconds = itertools.count(0, 20)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    walk()
    assert stderr.getvalue() == "60 s: block 0 of 4\n100 s: block 2 of 4\n140 s: block 4 of 4\n"


def test_something_short_leaves_no_line(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr := Stream())
    walk()
    assert stderr.getvalue() == ""

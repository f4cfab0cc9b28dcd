"""The `awq-jax` command; outside of the package, so that signals are settled before anything large is imported.

SIGTERM, SIGINT and SIGHUP end the process at once, whatever it computes: a thread waits for them, since Python's own
handlers wait for compiled programs. It removes the scratch folders first, so nothing is left.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

ENDINGS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
ERRORS: list[int] = []
"""The error stream as it was at the start, if there was one."""
ENDING = threading.Lock()
"""Taken by who ends the process, the main thread or the watching one."""


def main() -> None:
    """Runs the command; exit codes of signals are the shell's, 128 and the number."""
    open_closed_streams()
    keep_error_stream()
    # What is registered first runs last, and once, however often a process calls this.
    atexit.unregister(end_regularly)
    atexit.register(end_regularly)
    end_at_signals()
    from awq_jax.commands.cli import main as run

    run()


def open_closed_streams() -> None:
    """Nothing to read, nowhere to write: where the shell closed a stream, the next file opened would take its place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def keep_error_stream() -> None:
    """A way to the error stream that stays while a library's words are held back from it."""
    with suppress(OSError):
        ERRORS.append(os.dup(2))


def end_regularly() -> None:
    """Waits if a signal is ending the process, else ignores signals: Python would die of them in its last moments."""
    ENDING.acquire()
    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)


def end_at_signals() -> None:
    """From now on the signals end the process, except those that it was started to ignore (nohup)."""
    heard, told = os.pipe()
    os.set_blocking(told, False)
    threading.Thread(target=watch, args=(heard,), daemon=True).start()
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    for number in ENDINGS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def watch(heard: int) -> None:
    while (number := os.read(heard, 1)[0]) not in ENDINGS:
        pass
    ENDING.acquire()
    try:
        for step in (let_out, hold_tongues, end_children, discard_scratch, say_stopped):
            # The terminal may be gone, or the reader of the error stream: what is to be removed goes all the same.
            with suppress(Exception):
                step()
    finally:
        os._exit(128 + number)


def discard_scratch() -> None:
    """Removes the scratch folders; looked up last, since the main thread may still be importing what makes them."""
    if (scratch := sys.modules.get("awq_jax.formats.scratch")) is not None:
        scratch.discard_all()


def let_out() -> None:
    """What was printed and is still kept goes out, unless nobody reads it."""
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(2)


def hold_tongues() -> None:
    """What the other threads still say goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def say_stopped() -> None:
    """The last line on the error stream, with what is at the destination if there was one."""
    line = "awq-jax: stopped"
    with suppress(Exception):
        if told := sys.modules["awq_jax.formats.scratch"].outcome():
            line += f"; {told}"
    for errors in ERRORS:
        # A progress bar stands in the line, and hides the cursor.
        if takes_a_line(errors):
            os.write(errors, (b"\r\x1b[K\x1b[?25h" if os.isatty(errors) else b"") + os.fsencode(f"{line}.\n"))


def takes_a_line(stream: int) -> bool:
    """Whether it can be written without waiting for who reads, as far as the system tells."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(stream, select.POLLOUT)
    return bool(poll.poll(0))


def end_children() -> None:
    """Kills the processes that this one started, where the system tells which (Linux)."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            # "pid (name) state parent ...", and a name may hold anything.
            parent = (process / "stat").read_bytes().rpartition(b")")[2].split()[1]
            if int(parent) == os.getpid():
                os.kill(int(process.name), signal.SIGKILL)


if __name__ == "__main__":
    main()

"""The process of the `awq-jax` command: what signals and closed pipes do to it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import awq_jax_command
from awq_jax import text
from awq_jax.formats.written import written_whole

ROOT = Path(awq_jax_command.__file__).parent
STAND_IN = r"""
import hashlib, os, signal, subprocess, sys, time, types
from pathlib import Path
for number in (1, 2, 15):
    signal.signal(number, signal.SIG_IGN if str(number) in sys.argv[4:] else signal.SIG_DFL)
home, what = Path(sys.argv[1]), sys.argv[2]
sys.modules["awq_jax"] = types.ModuleType("awq_jax")  # without all that the package imports
sys.modules["awq_jax"].__path__ = [sys.argv[3]]
from awq_jax.formats import scratch

def run():
    with scratch.scratch_folder(home) as folder:
        (folder / "file").write_text("half")
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) if what == "child" else None
        if what == "printing":
            print("half a line", end="")
            os.write(1, b"ready\n")
        else:
            print(child.pid if child else "ready", flush=True)
        if what == "compiled":  # minutes in C, where no handler of Python's runs
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
        if what == "unread":
            sys.stdout.write("a" * 10**7)
        if what == "writing":
            for k in range(10**9):
                (folder / str(k)).write_text("")
        time.sleep(600)

def write():
    from awq_jax.formats.written import written_whole
    with written_whole(home / "out", overwrite=True) as folder:
        (folder / "file").write_text("new")
        if what != "complete":
            print("ready", flush=True)
            time.sleep(600)
    print("ready", flush=True)
    time.sleep(600)

class Importing:
    def find_spec(self, name, path, target=None):
        if name == "awq_jax.commands.cli":
            print("ready", flush=True)
            time.sleep(600)

if what == "imports":
    sys.meta_path.insert(0, Importing())
else:
    writes = what in ("complete", "cut short", "replacing")
    sys.modules["awq_jax.commands.cli"] = types.SimpleNamespace(main=write if writes else run)
import awq_jax_command
awq_jax_command.main()
"""


def started(
    home: Path, what: str, ignored: tuple[int, ...] = (), stderr: int = subprocess.PIPE
) -> tuple[subprocess.Popen, str]:
    """The command with a stand-in for what it runs, and the first line that this prints."""
    process = subprocess.Popen(
        [sys.executable, "-c", STAND_IN, str(home), what, str(ROOT / "awq_jax"), *map(str, map(int, ignored))],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def is_dead(stat: Path) -> bool:
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
@pytest.mark.parametrize("what", ["imports", "compiled", "writing", "child"])
def test_a_signal_ends_it_at_once_and_leaves_nothing(tmp_path, name, code, what):
    process, line = started(tmp_path, what)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "", "awq-jax: stopped.\n")
    assert list(tmp_path.iterdir()) == []
    if what == "child":
        end = time.monotonic() + 30
        while not is_dead(Path(f"/proc/{line}/stat")):
            assert time.monotonic() < end


@pytest.mark.parametrize(
    ("what", "says"), [("complete", "is complete"), ("cut short", "was not written"), ("replacing", "is as it was")]
)
def test_it_says_what_is_at_the_destination(tmp_path, what, says):
    if what == "replacing":
        with written_whole(tmp_path / "out") as folder:
            (folder / "file").write_text("old")
    process, _ = started(tmp_path, what)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (143, f"awq-jax: stopped; {tmp_path / 'out'} {says}.\n")
    found = {file.name: file.read_text() for file in (tmp_path / "out").glob("file")}
    assert found == {"complete": {"file": "new"}, "cut short": {}, "replacing": {"file": "old"}}[what]


def test_a_process_may_call_it_often_and_ends():
    program = """
import sys, awq_jax_command
sys.argv = ["awq-jax", "--version"]
for _ in range(2):
    try:
        awq_jax_command.main()
    except SystemExit:
        pass
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert len(done.stdout.splitlines()) == 2


def test_what_was_printed_is_not_lost(tmp_path):
    process, _ = started(tmp_path, "printing")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("half a line", "awq-jax: stopped.\n")


def test_it_waits_for_no_reader(tmp_path):
    heard, told = os.pipe()
    os.set_blocking(told, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(told, b"a" * 1000)
    os.set_blocking(told, True)
    process, _ = started(tmp_path, "unread", stderr=told)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert list(tmp_path.iterdir()) == []
    os.close(told)
    os.close(heard)


@pytest.mark.parametrize("make", [os.pipe, os.openpty])
def test_it_leaves_nothing_though_nobody_hears_that_it_stopped(tmp_path, make):
    heard, told = make()
    process, _ = started(tmp_path, "compiled", stderr=told)
    os.close(told)
    os.close(heard)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 129
    assert list(tmp_path.iterdir()) == []


def test_what_it_was_started_to_ignore_it_ignores(tmp_path):
    process, _ = started(tmp_path, "compiled", ignored=(signal.SIGHUP,))
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_goes_away(buffered):
    read, write = os.pipe()
    os.close(read)
    names = os.environ | ({} if buffered else {"PYTHONUNBUFFERED": "1"})
    command = [sys.executable, "-c", "from awq_jax_command import main; main()", "doctor"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=names, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


WITHOUT_STREAMS = """
import os, sys, types
from pathlib import Path

def run():
    print("out")
    print("err", file=sys.stderr)
    sys.stdout.flush()
    os.write(2, b"what a library says")
    with open(sys.argv[1], "w") as file:
        file.write(str([file.fileno() > 2, sys.stdin.read(), *map(os.get_inheritable, range(3))]))

sys.modules["awq_jax"] = types.ModuleType("awq_jax")
sys.modules["awq_jax.commands.cli"] = types.SimpleNamespace(main=run)
import awq_jax_command
awq_jax_command.main()
"""


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "</dev/null >&-", "</dev/null 2>&-"])
def test_closed_streams_lead_nowhere_and_no_file_takes_their_place(tmp_path, closed):
    command = [sys.executable, "-c", WITHOUT_STREAMS, str(tmp_path / "file")]
    done = subprocess.run(["sh", "-c", f'exec "$0" "$@" {closed}', *command], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "[True, '', True, True, True]"


def test_a_tokenizer_runs_without_an_error_stream(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with text.unprinted():
        pass


WRITES = f"""
import sys, time, types
sys.path.insert(0, {str(ROOT)!r})
sys.modules["awq_jax"] = types.ModuleType("awq_jax")  # without all that the package imports
sys.modules["awq_jax"].__path__ = [{str(ROOT / "awq_jax")!r}]

def run():
    from awq_jax.formats.written import written_whole
    with written_whole(sys.argv[3], overwrite=True) as new:
        for name in ("a", "b", "config.json"):
            (new / name).write_text(name + str("--symmetric" in sys.argv))
            time.sleep(0.02)

sys.modules["awq_jax.commands.cli"] = types.SimpleNamespace(main=run)
import awq_jax_command
awq_jax_command.main()
"""


def test_killed_at_any_moment(tmp_path):
    """What writes as the commands do; `benchmarks/kills.py` kills the commands themselves."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from kills import kills

    assert sum(n for what, n in kills(tmp_path, 16, 0, program=WRITES).items() if "whole" in what) == 16

"""Scratch folders of processes that live, end and die."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from awq_jax.formats import manifest, scratch
from awq_jax.formats.scratch import discard_all, scratch_folder

DIES = """
import os, sys, types
from pathlib import Path
sys.modules["awq_jax"] = types.ModuleType("awq_jax")  # without all that the package imports
sys.modules["awq_jax"].__path__ = [sys.argv[3]]
from awq_jax.formats.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("half")
    print("ready", flush=True)
    if sys.argv[2] == "dies":
        os._exit(9)
    sys.stdin.read()
"""


PACKAGE = str(Path(scratch.__file__).parents[1])


def started(home: Path, what: str) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", DIES, str(home), what, PACKAGE], **pipes)
    assert process.stdout.readline() == b"ready\n"
    return process


def test_it_goes_when_the_block_ends(tmp_path):
    with scratch_folder(tmp_path) as folder:
        (folder / "file").write_text("1")
        assert folder.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []


def test_those_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    started(tmp_path, "dies").communicate()
    living = started(tmp_path, "lives")
    assert len(list(tmp_path.iterdir())) == 1
    with scratch_folder(tmp_path):
        assert len(list(tmp_path.iterdir())) == 2
    living.communicate()
    assert list(tmp_path.iterdir()) == []


def test_one_of_another_machine_is_named(tmp_path, monkeypatch, caplog):
    started(tmp_path, "dies").communicate()
    monkeypatch.setattr(scratch, "machine", lambda: ("elsewhere", ""))
    assert_named_until_its_lock_goes(tmp_path, caplog)


def test_without_locks_all_stay_and_are_named(tmp_path, monkeypatch, caplog):
    started(tmp_path, "dies").communicate()
    monkeypatch.setattr(scratch, "fcntl", None)
    assert_named_until_its_lock_goes(tmp_path, caplog)


def assert_named_until_its_lock_goes(home, caplog):
    (left,) = home.iterdir()
    for part, name in (("old", "there"), ("new", "half")):
        (left / part).mkdir()
        (left / part / name).write_text("")
    manifest.write_manifest(left / "new")
    with caplog.at_level(logging.WARNING), scratch_folder(home), scratch_folder(home):
        assert len(list(home.glob(scratch.NAMES))) == 3
    lock = scratch.lock_of(left)
    (line,) = caplog.messages
    assert f"if nothing runs there, remove {lock}, and the next run puts back" in line
    assert left.exists()
    lock.unlink()
    with scratch_folder(home):
        pass
    assert [path.name for path in home.iterdir()] == ["there"]


@pytest.mark.parametrize("now", [("elsewhere", None), (None, "started anew")])
def test_another_container_and_another_start_of_this_machine_tell_the_dead(tmp_path, monkeypatch, now):
    started(tmp_path, "dies").communicate()
    here = scratch.machine()
    monkeypatch.setattr(scratch, "machine", lambda: tuple(b or a for a, b in zip(here, now, strict=True)))
    with scratch_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_empty_one_goes_under_its_maker_who_makes_another(tmp_path, monkeypatch):
    real, calls = scratch.os.open, []

    def taken(path, *args):
        calls.append(path)
        if len(calls) == 1:
            Path(path).parent.rmdir()
        return real(path, *args)

    monkeypatch.setattr(scratch.os, "open", taken)
    with scratch_folder(tmp_path) as folder:
        assert folder.exists()
    assert len(calls) == 2


def test_all_of_this_process(tmp_path):
    with scratch_folder(tmp_path / "."), scratch_folder(tmp_path):
        assert len(list(tmp_path.iterdir())) == 2
        discard_all()
        scratch.SETTLING.release()
        assert list(tmp_path.iterdir()) == []

"""The store: what is in it stays, whoever writes at the same time and whatever kills them."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time

import pytest
from stored import known, path

from awq_jax.errors import InputError
from awq_jax.records import store as module
from awq_jax.records.prompt import Prompt
from awq_jax.records.store import Key, store

KEYS = [Key(f"{k:02}", "c", "", "{}") for k in range(12)]


def test_what_was_put_is_found_and_stays(tmp_path):
    with store(path(tmp_path)) as one:
        assert one.get(KEYS[0]) is None
        one.put(KEYS[0], {"text": "é"})
        one.put(KEYS[0], {"text": "other"})
    with store(path(tmp_path)) as again:
        assert again.get(KEYS[0])["text"] == "é"
        assert abs(again.get(KEYS[0])["made"] - time.time()) < 600


def test_only_what_is_missing_is_made(tmp_path):
    made, told = [], []
    with store(path(tmp_path)) as one:
        one.put(KEYS[1], {})
        one.fill(KEYS[:3], lambda key: made.append(key) or {"n": 1}, lambda *at: told.append(at))
        one.fill(KEYS[:3], lambda key: pytest.fail("it is there"))
    assert made == [KEYS[0], KEYS[2]]
    assert told == [(1, 3), (2, 3)]


def test_checkpoints_by_name_and_digest(tmp_path):
    old, new = known("model", 1.0), known("model", 2.0)._replace(digest="abcdef12")
    with store(path(tmp_path)) as one:
        for each in (new, old):
            one.meet(each)
        assert one.named("model") == new
        assert one.named("abcdef") == new
        assert one.named(old.digest[:8]) == old
        assert (one.named("abc"), one.named("other")) == (None, None)
        one.note([Prompt("a", "b")])
        one.note([Prompt("a", "b")])


def test_a_checkpoint_met_without_its_sites_keeps_them(tmp_path):
    with_sites = known("model", 1.0)._replace(sites=[["layers/q", 4, 0.1, 0.2]])
    moved = with_sites._replace(name="moved", sites=[], seen=2.0)
    with store(path(tmp_path)) as one:
        one.meet(with_sites)
        one.meet(moved)
        assert one.checkpoints() == [moved._replace(sites=with_sites.sites)]
        one.meet(other := moved._replace(sites=[["layers/k", 4, 0.1, 0.2]]))
        assert one.checkpoints() == [other]


WORKER = """
    import sys, time
    from pathlib import Path
    from awq_jax.records.store import Key, store
    file, log, most = Path(sys.argv[1]), open(sys.argv[2], "a", buffering=1), int(sys.argv[3])
    made = 0
    def make(key):
        global made
        made += 1
        print("begins", key.prompt, file=log)
        time.sleep(0 if made <= most else 600)
        print("ends", key.prompt, file=log)
        return {}
    with store(file) as one:
        one.fill([Key(f"{k:02}", "c", "", "{}") for k in range(12)], make)
"""


def worker(folder, most):
    """A process that makes what is missing, and hangs after `most`."""
    command = [sys.executable, "-c", textwrap.dedent(WORKER), path(folder), folder / "log", most]
    return subprocess.Popen(list(map(str, command)))


def logged(folder, word):
    return [line.split()[1] for line in (folder / "log").read_text().splitlines() if line.startswith(word)]


def test_two_writers_share_the_work_and_what_a_killed_one_was_at_is_done_by_others(tmp_path):
    (tmp_path / "log").touch()
    doomed = [worker(tmp_path, 2) for _ in range(2)]
    while len(logged(tmp_path, "begins")) < 6:
        assert all(one.poll() is None for one in doomed)
        time.sleep(0.05)
    for one in doomed:
        os.kill(one.pid, signal.SIGKILL)
        one.wait()
    finished = logged(tmp_path, "ends")
    assert len({*finished}) == 4
    both = [worker(tmp_path, 12) for _ in range(2)]
    assert [one.wait(300) for one in both] == [0, 0]
    assert sorted(logged(tmp_path, "ends")) == [key.prompt for key in KEYS]
    with store(path(tmp_path)) as one:
        assert all(one.get(key) for key in KEYS)


def test_a_store_of_an_older_version_is_brought_to_the_newest(tmp_path, monkeypatch):
    with store(path(tmp_path)) as one:
        one.put(KEYS[0], {"n": 1})
    monkeypatch.setattr(module, "VERSIONS", (*module.VERSIONS, "CREATE TABLE more (x); ALTER TABLE results ADD y;"))
    with store(path(tmp_path)) as one:
        assert one.get(KEYS[0])["n"] == 1
        assert one.opened.execute("SELECT count(*) FROM more").fetchone() == (0,)
    monkeypatch.undo()
    with (
        pytest.raises(InputError, match="a store of version 2, this awq_jax knows up to 1: update it"),
        store(path(tmp_path)),
    ):
        pass


def test_what_is_no_store_is_left_alone(tmp_path):
    other, text = tmp_path / "other.sqlite", tmp_path / "text"
    with sqlite3.connect(other) as opened:
        opened.execute("CREATE TABLE mine (x)")
    text.write_text("no database " * 99)
    before = other.read_bytes()
    for file, says in ((other, "a database of something else"), (text, "cannot be used as a store")):
        with pytest.raises(InputError, match=says), store(file):
            pass
    assert other.read_bytes() == before

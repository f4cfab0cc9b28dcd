"""Damaged files of every kind are read or refused, never anything else; `benchmarks/fuzz.py` runs more of them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import fuzz
import mutate
import numpy as np

COUNTS = {"orbax": 100, "template": 5}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted from /proc")
@pytest.mark.parametrize("reader", fuzz.READERS)
def test_damaged_files_are_read_or_refused(reader):
    found = fuzz.fuzz(reader, COUNTS.get(reader, 200), seed=1)
    assert found["odd"] == {}
    assert found["ends"]["refused"] > 0


def test_a_seed_gives_the_same_damage(tmp_path):
    for name, content in (("a.json", b'{"a": [1, {"b": "c"}], "d": null}'), ("a.bin", bytes(range(200)))):
        ends = set()
        for folder in ("x", "y"):
            (tmp_path / folder).mkdir(exist_ok=True)
            file = tmp_path / folder / name
            file.write_bytes(content)
            ends.add((mutate.damage(file, np.random.default_rng(11)), file.read_bytes()))
        assert len(ends) == 1
        assert ends.pop()[1] != content


CHILD = """
import json, os, time
print('{"ready": true}', flush=True)
while True:
    seed = int(input())
    if seed == 1:
        os.abort()
    if seed == 2:
        time.sleep(60)
    print(json.dumps({"end": "read", "says": "", "size": 1, "memory": 2**40 * (seed == 3)}), flush=True)
"""


def test_what_hangs_dies_or_takes_memory_is_counted(monkeypatch, tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    start = lambda self, reader: vars(self).update(command=[sys.executable, script], process=None)
    monkeypatch.setattr(fuzz, "SECONDS", 5)
    monkeypatch.setattr(fuzz.Child, "__init__", start)
    found = fuzz.fuzz("folder", 5, 0)
    assert found["ends"] == {"read": 2, "crash -6": 1, "hang": 1, "memory": 1}
    assert set(found["odd"]) == {1, 2, 3}

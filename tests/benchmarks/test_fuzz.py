"""Damaged files of every kind are read or refused, never anything else; `benchmarks/fuzz.py` runs more of them."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import fuzz
import mutate
import numpy as np

from awq_jax.commands.inspect import inspect
from awq_jax.errors import InputError
from awq_jax.formats import manifest
from awq_jax.formats.orbax import load_params, save_params
from awq_jax.pipeline.load import load

COUNTS = {"orbax": 100}
LARGE = 10
"""Cases of files of some tens of MB."""


@pytest.fixture(scope="module")
def child():
    """One process for all readers: it takes seconds to start."""
    child = fuzz.Child()
    yield child
    child.end()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted from /proc")
@pytest.mark.parametrize("reader", fuzz.READERS)
def test_damaged_files_are_read_or_refused(reader, child):
    count = LARGE if reader.startswith("large") else COUNTS.get(reader, 200)
    found = fuzz.fuzz(reader, count, 1, child)
    assert found["odd"] == {}
    assert sum(found["ends"].values()) == count


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


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"shape": [0]}, r"shape \[0\]"),
        ({"chunks": [10**12]}, "larger than shape"),
        ({"shape": [10**12]}, "1 of 15625000000 chunks are there"),
        ({"shape": [10**12], "chunks": [10**12]}, "bytes are too few for shape"),
        ({"chunks": [None]}, r"chunks \[None\]"),
    ],
)
def test_headers_of_arrays_that_ask_for_what_is_not_there(tmp_path, changes, why):
    folder = fuzz.READERS["orbax"].make(tmp_path)
    header = folder / "params" / "norm" / "scale" / ".zarray"
    header.write_text(json.dumps(json.loads(header.read_text()) | changes))
    for read in (inspect, load):
        with pytest.raises(InputError, match=why):
            read(folder)


def test_arrays_of_zeros_are_read(tmp_path):
    params = {"a": np.zeros((2000, 2000), np.float32), "b": np.zeros(3, np.float32)}
    save_params(tmp_path / "zeros", params)
    assert load_params(tmp_path / "zeros")["a"].shape == (2000, 2000)


def test_what_costs_a_file_is_found(tmp_path, monkeypatch):
    """The fuzz's own checks, where a list may name any file."""
    monkeypatch.setattr(manifest, "mark", lambda file: "1")
    for reader, where in (("manifest", "mixed"), ("moves", "7/.awq_jax-*/new/out")):
        home = fuzz.READERS[reader].make(tmp_path / reader)
        (listed,) = home.glob(f"{where}/{manifest.MANIFEST}")
        files = dict.fromkeys(["x", "y/x", "config.json", "params/0", "model", "more"], "1")
        listed.write_text(json.dumps({"files": files}))
        with pytest.raises(AssertionError, match="a file of somebody else"):
            fuzz.READERS[reader].read(home, listed)


CHILD = """
import json, os, time
while True:
    _, *seed = input().split()
    if not seed:
        print('{"ready": true}', flush=True)
        continue
    seed = int(seed[0])
    if seed == 1:
        os.abort()
    if seed == 2:
        time.sleep(60)
    print(json.dumps({"end": "read", "says": "", "size": 1, "seconds": 1, "memory": 2**40 * (seed == 3)}), flush=True)
"""


def test_what_hangs_dies_or_takes_memory_is_counted(monkeypatch, tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    monkeypatch.setattr(fuzz, "SECONDS", 5)
    monkeypatch.setattr(fuzz.Child, "command", (sys.executable, script))
    found = fuzz.fuzz("folder", 5, 0)
    assert found["ends"] == {"read": 2, "crash -6": 1, "hang": 1, "memory": 1}
    assert set(found["odd"]) == {1, 2, 3}

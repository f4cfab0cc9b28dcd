"""Safetensors files, written a few tensors at a time."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from awq_jax.formats.safetensors import open_shards
from awq_jax.formats.shard_writer import ShardWriter

DTYPES = (np.int32, np.float16, np.uint8, ml_dtypes.bfloat16, np.float32)


def tensors(k):
    """Of every dtype, of odd sizes, empty and without axes too."""
    shapes = ((3, 5), (7,), (), (0, 2), (1, 1, 3))
    rng = np.random.default_rng(k)
    kinds = zip(shapes, DTYPES, strict=True)
    return {f"part {k} é {i}": np.asarray(100 * rng.random(s)).astype(d) for i, (s, d) in enumerate(kinds)}


def written(folder, parts, limit):
    writer = ShardWriter(folder, limit)
    for part in parts:
        writer.add(part)
    writer.finish()
    return sorted(p.name for p in folder.iterdir())


def assert_read(folder, parts):
    """The official library and the reader here find all tensors, at multiples of the size of their items."""
    expected = {name: w for part in parts for name, w in part.items()}
    read = {name: w for file in folder.glob("*.safetensors") for name, w in load_file(file).items()}
    assert read.keys() == expected.keys() == open_shards(folder).keys()
    for name, w in expected.items():
        for found in (read[name], open_shards(folder)[name].read()):
            assert (found.dtype, found.shape) == (w.dtype, w.shape)
            np.testing.assert_array_equal(found, w)
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
        assert header.pop("__metadata__") == {"format": "pt"}
        assert size % 8 == 0
        assert all(entry["data_offsets"][0] % expected[name].dtype.itemsize == 0 for name, entry in header.items())


def test_a_small_model_is_one_file(tmp_path):
    parts = [tensors(k) for k in range(3)]
    assert written(tmp_path, parts, 10**6) == ["model.safetensors"]
    assert_read(tmp_path, parts)


def test_a_large_one_is_several_and_their_index(tmp_path):
    parts = [tensors(k) for k in range(5)]
    size = sum(w.nbytes for w in parts[0].values())
    shards = [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    assert written(tmp_path, parts, 2 * size) == [*shards, "model.safetensors.index.json"]
    assert_read(tmp_path, parts)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * size
    assert index["weight_map"] == {name: shards[k // 2] for k, part in enumerate(parts) for name in part}


@pytest.mark.parametrize("limit", [1, 100])
def test_a_part_is_never_split(tmp_path, limit):
    parts = [tensors(k) for k in range(2)]
    assert len(written(tmp_path, parts, limit)) == 3
    for file, part in zip(sorted(tmp_path.glob("*.safetensors")), parts, strict=True):
        assert set(load_file(file)) == set(part)


def test_torch_reads_them(tmp_path):
    torch = pytest.importorskip("torch")
    parts = [tensors(k) for k in range(2)]
    written(tmp_path, parts, 10**6)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, w in (parts[0] | parts[1]).items():
        assert torch.equal(found[name].to(torch.float64), torch.tensor(w.astype(np.float64)))


def test_memory_holds_one_part(tmp_path):
    import tracemalloc

    tracemalloc.start()
    written(tmp_path, ({f"{k}": np.zeros(2**20, np.float32)} for k in range(50)), 10**9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 45 * 2**20

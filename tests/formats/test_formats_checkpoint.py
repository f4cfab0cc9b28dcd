"""Hugging Face folders: what is read, and what is said of those that cannot be."""

import json
import os
import tracemalloc
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from folders import hf_folder
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from awq_jax.errors import InputError
from awq_jax.formats import huggingface
from awq_jax.formats import safetensors as shards
from awq_jax.formats.checkpoint import open_checkpoint
from awq_jax.formats.safetensors import open_shard

DTYPES = ["float16", "float32", "float64", "int8", "uint8", "int32", "int64", "bool"]


def random(shape=(3, 4), dtype="float32", seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * 50).astype(dtype)


def raw_shard(file, header, data=b""):
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("file", ["model.safetensors", "other.safetensors"])
def test_a_folder_with_one_file(tmp_path, file):
    tensors = {dtype: random(dtype=dtype) for dtype in DTYPES} | {"empty": np.zeros((0, 3), np.float32)}
    tensors["bfloat16"] = random(dtype=ml_dtypes.bfloat16)
    tensors["scalar"] = np.array(3.0, np.float32)
    checkpoint = open_checkpoint(hf_folder(tmp_path, {file: tensors}, {"hidden_size": 4}))
    assert (checkpoint.kind, checkpoint.names) == ("huggingface", frozenset(tensors))
    assert checkpoint.config == {"model_type": "llama", "hidden_size": 4}
    assert checkpoint.nbytes == sum(t.nbytes for t in tensors.values())
    for name, expected in tensors.items():
        found = checkpoint.read(name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape) == (found.dtype, checkpoint.shape(name))
        np.testing.assert_array_equal(found, expected)


def test_a_folder_that_is_half_replaced(tmp_path):
    """Its new files alone are a model too, another than either."""
    folder = hf_folder(tmp_path, {"model.safetensors": {"w": random()}})
    (folder / ".awq_jax-01234567" / "old").mkdir(parents=True)
    with pytest.raises(InputError, match=r"its old files lie in \.awq_jax-01234567: .* puts them back"):
        open_checkpoint(folder)
    (folder / ".awq_jax-01234567" / "old").rmdir()
    assert open_checkpoint(folder).names == {"w"}


def test_shards_are_read_through_their_index(tmp_path):
    shards = {f"model-{i}.safetensors": {f"w{i}": random(seed=i), f"b{i}": random((2,), seed=9 + i)} for i in (1, 2)}
    checkpoint = open_checkpoint(hf_folder(tmp_path, shards))
    assert checkpoint.names == {"w1", "b1", "w2", "b2"}
    np.testing.assert_array_equal(checkpoint.read("w2"), shards["model-2.safetensors"]["w2"])


def test_reading_maps_the_file_and_copies_nothing(tmp_path):
    checkpoint = open_checkpoint(hf_folder(tmp_path, {"model.safetensors": {"w": np.ones((1024, 1024), np.float32)}}))
    tracemalloc.start()
    w = checkpoint.read("w")
    assert w.sum() == 2**20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert not w.flags.writeable


def test_params_are_what_the_model_loads_as_jax_arrays(tmp_path):
    w = random(dtype=ml_dtypes.bfloat16)
    checkpoint = open_checkpoint(hf_folder(tmp_path, {"model.safetensors": {"w": w}}))
    module = SimpleNamespace(load=lambda read, config: {"kernel": read(config).T})
    kernel = checkpoint.params(module, "w")["kernel"]
    assert isinstance(kernel, jax.Array)
    assert kernel.dtype == w.dtype
    np.testing.assert_array_equal(kernel, w.T)


def test_a_missing_tensor_is_named_with_the_nearest(tmp_path):
    checkpoint = open_checkpoint(hf_folder(tmp_path, {"model.safetensors": {"model.norm.weight": random()}}))
    with pytest.raises(InputError, match=r"no tensor model\.norm\.weigth among its 1; near it: model\.norm\.weight"):
        checkpoint.read("model.norm.weigth")


@pytest.mark.parametrize("model", ["/nowhere/model", "./model", "../model", "a/b/c", "model.gguf", "spaces in it"])
def test_a_path_that_is_not_there(model):
    with pytest.raises(InputError, match="does not exist: give a folder"):
        open_checkpoint(model)


@pytest.mark.parametrize("reason", [OSError("no connection"), RuntimeError("401 Unauthorized")])
def test_a_hub_name_that_cannot_be_fetched(monkeypatch, reason):
    def fail(*args, **kwargs):
        raise reason

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(InputError, match=f"org/model is no folder.*{reason}.*give a local folder or a .gguf file"):
        open_checkpoint("org/model")


def test_a_hub_name_opens_the_fetched_folder_without_pickles_and_code(tmp_path, monkeypatch):
    hf_folder(tmp_path, {"model.safetensors": {"w": random()}})
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kw: asked.update(kw) or str(tmp_path))
    assert open_checkpoint("org/model").names == {"w"}
    assert "*.safetensors" in asked["allow_patterns"]
    assert not [p for p in asked["allow_patterns"] if "bin" in p or p.endswith((".py", "*", ".pt"))]


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json: give the folder of a Hugging Face model"):
        open_checkpoint(tmp_path)
    (tmp_path / "m.gguf").touch()
    with pytest.raises(InputError, match=r"give the file .*m\.gguf itself"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no safetensors file: give"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match=r"pytorch_model\.bin but no safetensors.*save_pretrained"):
        open_checkpoint(tmp_path)


def test_a_single_shard_is_not_a_model(tmp_path):
    hf_folder(tmp_path, {"model.safetensors": {"w": random()}})
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(InputError, match="one file of a model: give its folder"):
            open_checkpoint(tmp_path / name)


def test_a_folder_of_models_names_those_below(tmp_path):
    """As `quantize --format awq,mlx` leaves."""
    for name in ("mlx", "awq"):
        hf_folder(tmp_path / name, {"model.safetensors": {"w": random()}})
    with pytest.raises(InputError, match=r"no config\.json: its models lie below, give .*/awq or .*/mlx\.$"):
        open_checkpoint(tmp_path)


def test_a_folder_that_cannot_be_looked_into(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(0)
    if os.access(closed, os.R_OK):
        pytest.skip("this user may read all")
    with pytest.raises(PermissionError):
        open_checkpoint(closed)


def test_what_is_no_model_at_all(tmp_path):
    (tmp_path / "a.txt").write_text("Once upon a time there was a text")
    with pytest.raises(InputError, match=r"starts with b'Once'.*no GGUF file: give one, or the folder of a"):
        open_checkpoint(tmp_path / "a.txt")
    with pytest.raises(InputError, match="name of the model is empty: give"):
        open_checkpoint("")


def test_shards_and_index_that_do_not_fit(tmp_path):
    shards = {f"model-{i}.safetensors": {f"w{i}": random()} for i in (1, 2)}
    hf_folder(tmp_path, shards)
    index = tmp_path / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": where | {"w3": "model-1.safetensors"}}))
    with pytest.raises(InputError, match=r"model-1\.safetensors has no tensor w3"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": where}))
    save_file({"w1": random(), "w2": random()}, tmp_path / "model-1.safetensors")
    with pytest.raises(InputError, match=r"model-1\.safetensors has a tensor w2 that model\.saf.* does not name there"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": where | {"w3": "model-3.safetensors"}}))
    with pytest.raises(InputError, match=r"lacks model-3\.safetensors, one of 1 missing of the 3 shards"):
        open_checkpoint(tmp_path)
    for content, says in (("[]", "holds a list, not an object"), ('{"weight_map": [1]}', "is not an index")):
        index.write_text(content)
        with pytest.raises(InputError, match=says):
            open_checkpoint(tmp_path)
    index.unlink()
    with pytest.raises(InputError, match=r"2 safetensors files but no model\.safetensors\.index\.json"):
        open_checkpoint(tmp_path)


def test_damaged_files(tmp_path):
    hf_folder(tmp_path, {"model.safetensors": {"w": random((64, 64))}})
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 7, 40, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(
            InputError, match=r"model\.safetensors is cut short or no safetensors file .*ownload it again"
        ):
            open_checkpoint(tmp_path)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match="git lfs pull"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"{not json}", "no safetensors file .*JSON"),
        ({"w": {"dtype": "F32"}}, "no safetensors file .*missing field `shape`"),
        ({"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, "w is stored as F8_E4M3.*convert"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "invalid shape"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "invalid offset"),
    ],
)
def test_headers_that_cannot_be(tmp_path, header, says):
    hf_folder(tmp_path, {})
    raw_shard(tmp_path / "model.safetensors", header, b"1234")
    with pytest.raises(InputError, match=rf"model\.safetensors.*{says}"):
        open_checkpoint(tmp_path)


def saved_tokenizer(folder, **config):
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def test_the_tokenizer_of_a_folder(tmp_path):
    checkpoint = open_checkpoint(hf_folder(tmp_path, {"model.safetensors": {"w": random()}}))
    with pytest.raises(InputError, match=r"no tokenizer: copy tokenizer\.json"):
        checkpoint.tokenizer()
    saved_tokenizer(tmp_path)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer("b a c").input_ids == [2, 1, 0]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    names = {p.name for p in open_checkpoint(tmp_path).tokenizer_files}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_code_in_a_tokenizer_folder_is_not_run(tmp_path):
    hf_folder(tmp_path, {"model.safetensors": {"w": random()}})
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    with pytest.raises(InputError, match=r'names code of its own \("auto_map"\), which is never'):
        open_checkpoint(tmp_path).tokenizer()


def test_each_file_of_a_tokenizer_is_parsed_once(tmp_path, monkeypatch):
    hf_folder(tmp_path, {"model.safetensors": {"w": random()}})
    saved_tokenizer(tmp_path)
    parsed, read = [], huggingface.read_json
    monkeypatch.setattr(huggingface, "read_json", lambda file: parsed.append(file.name) or read(file))
    huggingface.load_tokenizer(tmp_path)
    assert sorted(parsed) == ["config.json", "tokenizer.json", "tokenizer_config.json"]


def test_json_keeps_its_letters(tmp_path):
    huggingface.write_json(tmp_path / "a.json", {"chat": "naïve 日本"})
    assert "日本" in (tmp_path / "a.json").read_text("utf-8")
    assert huggingface.read_json(tmp_path / "a.json") == {"chat": "naïve 日本"}


def shard_of(rng):
    """The header and the data of a valid safetensors file of small tensors, in any order, empty ones among them."""
    names = rng.permutation(["a", "b", "c.weight", "é"])[: rng.integers(1, 5)]
    kinds = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "I32": 4, "BOOL": 1}
    header, at = {}, 0
    for name in map(str, names):
        kind, shape = str(rng.choice(list(kinds))), rng.integers(0, 4, size=rng.integers(0, 3)).tolist()
        end = at + kinds[kind] * int(np.prod(shape, dtype=int))
        header[name], at = {"dtype": kind, "shape": shape, "data_offsets": [at, end]}, end
    order = rng.permutation(list(header)).tolist()
    return {name: header[name] for name in order}, bytes(at)


@pytest.mark.parametrize("seed", range(4))
def test_headers_pass_exactly_if_the_library_passes_them(tmp_path, seed):
    rng, file, passed = np.random.default_rng(seed), tmp_path / "model.safetensors", 0
    for _ in range(150):
        header, data = shard_of(rng)
        entry = header[str(rng.choice(list(header)))]
        at = rng.integers(0, 2)
        match rng.integers(0, 6):
            case 0:
                entry["data_offsets"][at] += int(rng.choice([-4, -1, 1, 4, 2**62]))
            case 1:
                entry["shape"] = entry["shape"][::-1] + [1] * at
            case 2:
                entry["shape"] = [[2**63, 2], [-1], [1.0], ["1"], [[1]], None][rng.integers(6)]
            case 3:
                data = data[:-1] if at else data + b"\0"
            case 4:
                header["z"] = dict(entry)
        text = bytearray(json.dumps(header, default=str).encode())
        if rng.integers(0, 3) == 0:
            text[rng.integers(len(text))] ^= 1 << rng.integers(8)
        raw_shard(file, bytes(text), data)
        try:
            with safe_open(file, "np") as found:
                expected = {name: found.get_slice(name) for name in found.keys()}  # noqa: SIM118
                expected = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in expected.items()}
        except Exception:
            with pytest.raises(InputError, match="no safetensors file"):
                open_shard(file)
            continue
        if all(kind in shards.DTYPES for _, kind in expected.values()):
            found = open_shard(file)
            assert {name: part.shape for name, part in found.items()} == {
                n: shape for n, (shape, _) in expected.items()
            }
            assert {name: part.read().dtype for name, part in found.items()} == {
                n: shards.DTYPES[kind] for n, (_, kind) in expected.items()
            }
            passed += 1
    assert passed > 20


def test_data_in_any_order_is_found(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(2, 3)).astype(dtype) for name, dtype in zip("dcba", DTYPES, strict=False)}
    arrays["empty"] = np.zeros((0, 2), np.float32)
    save_file(arrays, tmp_path / "model.safetensors")
    found = open_shard(tmp_path / "model.safetensors")
    for name, expected in load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(found[name].read(), expected)


@pytest.mark.parametrize(
    ("own", "eos", "expected"),
    [
        ({"eos_token_id": 9, "top_p": 0.9}, [7, 9], {"eos_token_id": [9, 7], "top_p": 0.9}),
        ({}, 7, {"eos_token_id": [7]}),
        ({"eos_token_id": [9, 7]}, 7, None),
        ({"top_p": 0.9}, None, None),
        (None, 7, {"eos_token_id": 7}),
    ],
)
def test_the_generation_config_that_goes_along_names_all_stops(tmp_path, own, eos, expected):
    model = hf_folder(tmp_path / "m", {"model.safetensors": {}}, {"eos_token_id": eos})
    if own is not None:
        (model / "generation_config.json").write_text(json.dumps(own))
    checkpoint = open_checkpoint(model)
    (file,) = (file for file in checkpoint.companions if file.name == "generation_config.json")
    assert json.loads(file.read_text()) == (own if expected is None else expected)
    assert (file.parent == model) == (expected is None)

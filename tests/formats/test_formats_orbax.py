"""awq_jax's own folders."""

import json
import os
from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import Source

from awq_jax import Recipe
from awq_jax.errors import InputError
from awq_jax.formats import orbax
from awq_jax.formats.checkpoint import open_checkpoint
from awq_jax.formats.written import written_whole
from awq_jax.tracing.view import View
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import QuantizedTensor, is_quantized, round_to_nearest, with_input_scale

CONFIG = {"model_type": "llama", "hidden_size": 4}


def weight(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def all_kinds():
    """Params with every kind of leaf."""
    layout = View.of((4, 40, 2)).layout((0,), (1,))
    q = round_to_nearest(weight(40, 6), QuantSpec(3, 32))
    return {
        "dense": {"f32": weight(3), "bf16": weight(2, 2).astype(jnp.bfloat16), "scalar": jnp.float32(2)},
        "padded": {"kernel": q},
        "scaled": {"kernel": with_input_scale(round_to_nearest(weight(64, 6), QuantSpec(4, 32)), weight(64))},
        "symmetric": {"kernel": round_to_nearest(weight(64, 6).astype(jnp.bfloat16), QuantSpec(8, 64, symmetric=True))},
        "experts": round_to_nearest(weight(4, 32, 2), QuantSpec(2, 32)),
        "laid_out": QuantizedTensor(**{**vars(round_to_nearest(weight(4, 40, 2), QuantSpec(5, 32))), "layout": layout}),
    }


def written(folder, **parts):
    companion = folder / "tokenizer.json"
    companion.write_text("{}")
    out = folder / "out"
    out.mkdir()
    writer = orbax.Writer(out, Source(CONFIG, (companion,)), Recipe(bits=3))
    for part, params in parts.items():
        writer.write(part, params)
    writer.finish()
    return out


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        np.testing.assert_array_equal(a, b)


def test_parts_come_back_as_they_were(tmp_path):
    params = {"outer": all_kinds(), "layers_0": {"kernel": round_to_nearest(weight(32, 8), QuantSpec(4, 32))}}
    out = written(tmp_path, **params)
    found, about = orbax.load(out)
    assert_same(found, params)
    np.testing.assert_array_equal(found["outer"]["laid_out"].dequantize(), params["outer"]["laid_out"].dequantize())
    assert (about["version"], about["parts"], about["recipe"]) == (1, ["outer", "layers_0"], repr(Recipe(bits=3)))
    assert_same(orbax.load_part(out, "layers_0"), params["layers_0"])


def test_the_folder_is_a_checkpoint(tmp_path):
    layer = {"kernel": round_to_nearest(weight(32, 8), QuantSpec(4, 32))}
    checkpoint = open_checkpoint(written(tmp_path, outer={"embed": {"embedding": weight(8, 4)}}, layers_0=layer))
    assert (checkpoint.kind, checkpoint.config, checkpoint.names) == ("orbax", CONFIG, frozenset())
    assert [p.name for p in checkpoint.companions] == ["tokenizer.json"]
    assert checkpoint.nbytes > layer["kernel"].nbytes
    assert_same(checkpoint.params(None, None), {"embed": {"embedding": weight(8, 4)}, "layers_0": layer})
    with pytest.raises(InputError, match="read whole, with `params`"):
        checkpoint.read("model.norm.weight")


def test_folders_that_are_not_whole_or_not_ours(tmp_path):
    with pytest.raises(InputError, match=r"no awq_jax\.json: awq_jax did not write it"):
        orbax.load(tmp_path)
    out = written(tmp_path, outer={"norm": weight(4)})
    with pytest.raises(InputError, match=r"no part 'layers_7'; it has \['outer'\]"):
        orbax.load_part(out, "layers_7")
    for file in (out / "params" / "outer").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(InputError, match="outer is damaged"):
        orbax.load(out)
    about = json.loads((out / "awq_jax.json").read_text())
    (out / "awq_jax.json").write_text("{}")
    with pytest.raises(InputError, match=r"awq_jax\.json: version is None, not 1: write or download it again"):
        orbax.load(out)
    (out / "awq_jax.json").write_text(json.dumps(about | {"version": 2}))
    with pytest.raises(InputError, match="has version 2 of awq_jax's format, this awq_jax reads 1: upgrade"):
        orbax.load(out)


def test_params_of_any_function(tmp_path):
    kernel = round_to_nearest(weight(64, 8), QuantSpec(3, 32))
    params = {"params": {"dense": {"kernel": kernel, "bias": np.ones(8, np.float32)}}}
    orbax.save_params(tmp_path / "small", params)
    found = orbax.load_params(tmp_path / "small")
    assert jax.tree.structure(found) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    with pytest.raises(FileExistsError):
        orbax.save_params(tmp_path / "small", params)
    with pytest.raises(ValueError, match="params/a is a float"):
        orbax.save_params(tmp_path / "other", {"a": 1.0, "b": kernel})
    with pytest.raises(ValueError, match="params are one leaf"):
        orbax.save_params(tmp_path / "other", kernel)
    with pytest.raises(ValueError, match="'a' is a param, and the path of others"):
        orbax.save_params(tmp_path / "other", {"a": kernel, "a/b": kernel})
    for nothing in ({}, None, {"a": None}):
        with pytest.raises(ValueError, match="without an array in it"):
            orbax.save_params(tmp_path / "other", nothing)
    assert not (tmp_path / "other").exists()


class Linear(NamedTuple):
    kernel: Any
    bias: Any


def test_params_of_any_structure(tmp_path):
    kernel = round_to_nearest(weight(64, 8), QuantSpec(3, 32))
    params = (nn.Partitioned(kernel, ("in", "out")), [Linear(kernel, weight(8)), {"norm": weight(4)}])
    orbax.save_params(tmp_path / "small", params)
    dense = jax.tree.map(lambda w: w.dequantize() if is_quantized(w) else w, params, is_leaf=is_quantized)
    shapes = jax.eval_shape(lambda: dense)
    for like in (params, shapes):
        found = orbax.load_params(tmp_path / "small", like)
        assert jax.tree.structure(found) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, found, params)
    named = orbax.load_params(tmp_path / "small")
    assert jax.tree.structure(named) == jax.tree.structure(
        {"0": kernel, "1": {"0": {"kernel": kernel, "bias": 0}, "1": {"norm": 0}}}
    )
    odd = "0 is not among yours, 1/1/norm is not among yours, 1/1/scale is missing"
    with pytest.raises(InputError, match=f"holds other params: {odd}"):
        orbax.load_params(tmp_path / "small", (None, [Linear(weight(64, 8), weight(8)), {"scale": weight(4)}]))
    wide = (dense[0], [Linear(weight(64, 9), weight(8)), dense[1][1]])
    with pytest.raises(InputError, match=r"1/0/kernel has shape \(64, 8\), yours \(64, 9\)\. Give as `like` those"):
        orbax.load_params(tmp_path / "small", wide)


def digests(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_params_are_read_and_placed_piece_by_piece(tmp_path, monkeypatch):
    params = {f"layer.{k}": {"kernel": round_to_nearest(weight(64, 8, seed=k), QuantSpec(4, 32))} for k in range(5)}
    params |= {"layer.5": {"kernel": jnp.ones((8, 8))}}
    orbax.save_params(tmp_path / "out", params)
    read, restored = [], orbax.restored
    monkeypatch.setattr(orbax, "restored", lambda part, like: read.append(like) or restored(part, like))
    with pytest.raises(InputError, match=r"layer\.5/kernel has shape"):
        orbax.load_params(tmp_path / "out", like=params | {"layer.5": {"kernel": jnp.ones((8, 9))}})
    assert not read
    mesh = jax.make_mesh((2,), ("x",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    like = jax.eval_shape(lambda: params)
    like |= {"layer.5": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=place)}}
    for at_once, times in ((1 << 28, 1), (params["layer.0"]["kernel"].nbytes + 1, 3)):
        monkeypatch.setattr(orbax, "AT_ONCE", at_once)
        read.clear()
        found = orbax.load_params(tmp_path / "out", like=like)
        assert_same(found, params)
        assert found["layer.5"]["kernel"].sharding == place
        assert len(read) == times


def test_the_same_params_are_the_same_bytes(tmp_path):
    recipe = Recipe(scale=lambda w, moments, spec: moments.mean_abs, clip=lambda *args: None)
    for name in ("one", "two"):
        with written_whole(tmp_path / name) as folder:
            writer = orbax.Writer(folder, None, replace(recipe))
            writer.write("outer", all_kinds())
            writer.finish()
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert " at 0x" not in (tmp_path / "one" / "awq_jax.json").read_text()


@pytest.mark.parametrize(
    "name", ["[ab]", "a]b[", "a\\b", "gs:", "a b", "*?{}%20", "-x", "new\nline", "ü", "\udcff", "x" * 255]
)
@pytest.mark.parametrize("below", [True, False])
def test_any_path_can_be_read(tmp_path, name, below):
    params = {"a": weight(3), "b": round_to_nearest(weight(32, 2), QuantSpec(4, 32))}
    folder = tmp_path / name / "out" if below else tmp_path / "out" / name
    folder.parent.mkdir()
    orbax.save_params(folder, params)
    assert_same(orbax.load_params(folder), params)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert sorted(p.name for p in tmp_path.iterdir()) == [folder.parent.name]


def test_temporary_files_of_a_path_that_orbax_cannot_read_are_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "t\\mp").mkdir()
    (tmp_path / "[out]").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t\\mp"))
    with pytest.raises(InputError, match="set TMPDIR to another folder"):
        orbax.Writer(tmp_path / "[out]", None)


def test_nothing_is_printed(tmp_path, capfd):
    orbax.save_params(tmp_path / "out", {"a": weight(3)})
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("read", [orbax.load, orbax.shapes])
@pytest.mark.parametrize("odd", ["folder link", "pipe", "link"])
def test_nothing_outside_of_the_folder_is_read_or_waited_for(tmp_path, read, odd):
    orbax.save_params(tmp_path / "out", {"a": weight(3), "b": weight(4)})
    part = tmp_path / "out" / "params" / "params"
    name = "a" if odd == "folder link" else "_METADATA"
    (part / name).rename(tmp_path / name)
    if odd == "pipe":
        os.mkfifo(part / name)
    else:
        (part / name).symlink_to(tmp_path / name)
    expected = "is a pipe" if odd == "pipe" else "outside of the model's folder"
    with pytest.raises(InputError, match=expected):
        read(tmp_path / "out")


def test_any_key_can_be_read(tmp_path):
    keys = ("a.b", "a\\b", "[x]", "..", ".", "a%2Eb", "ü", "\udcff", "a\0b", "x" * 300)
    params = {key: np.float32([k]) for k, key in enumerate(keys)} | {"a": {"b": np.float32([99])}}
    for names in (keys[:-1], keys):
        kept = {key: params[key] for key in (*names, "a")}
        orbax.save_params(tmp_path / "out", kept, overwrite=True)
        assert_same(orbax.load_params(tmp_path / "out"), kept)


def test_a_folder_that_cannot_be_read_back_never_comes_to_be(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax, "rebuilt", lambda *args: 1 / 0)
    with pytest.raises(ValueError, match=r"is damaged .ZeroDivisionError"):
        orbax.save_params(tmp_path / "out", {"a": weight(3), "b": weight(4)})
    assert list(tmp_path.iterdir()) == []


def test_save_params_replaces_only_what_it_wrote(tmp_path):
    orbax.save_params(tmp_path / "out", {"a": weight(3)})
    orbax.save_params(tmp_path / "out", {"b": weight(3)}, overwrite=True)
    (tmp_path / "out" / "params" / "mine").write_text("")
    with pytest.raises(FileExistsError, match="holds params/mine, which awq_jax did not write"):
        orbax.save_params(tmp_path / "out", {"c": weight(3)}, overwrite=True)
    assert set(orbax.load_params(tmp_path / "out")) == {"b"}


def test_keys_with_slashes_need_their_structure(tmp_path):
    params = {"mlp/~/linear_0": {"w": round_to_nearest(weight(32, 8), QuantSpec(4, 32))}, "b": weight(3)}
    orbax.save_params(tmp_path / "small", params)
    found = orbax.load_params(tmp_path / "small", params)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert set(orbax.load_params(tmp_path / "small")) == {"mlp", "b"}

"""From any format to any other and back, to the bit; what a format does not hold is refused with what helps."""

import json
import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from quantized import rounded_folder
from safetensors.numpy import load_file, save_file

import awq_jax as awq
from awq_jax import QuantSpec, convert
from awq_jax.errors import InputError
from awq_jax.formats.checkpoint import open_checkpoint
from awq_jax.pipeline.weights_of import stored_weights
from awq_jax.weights.tensor import is_quantized

SYMMETRIC = QuantSpec(4, 32, symmetric=True)
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def awq_folder(root):
    return rounded_folder(root, "awq", QuantSpec(4, 32))


@pytest.fixture(scope="module")
def symmetric(root):
    return rounded_folder(root / "symmetric", "compressed-tensors", SYMMETRIC)


def stored(folder):
    return load_file(folder / "model.safetensors")


def assert_same_files(a, b):
    one, other = stored(a), stored(b)
    assert one.keys() == other.keys()
    for name, w in one.items():
        assert w.dtype == other[name].dtype, name
        np.testing.assert_array_equal(w, other[name], err_msg=name)


def read_all(folder):
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.names}


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq_v2", "mlx", "orbax"])
def test_there_and_back_every_bit_is_the_same(awq_folder, root, format):
    told = []
    there = convert(awq_folder, root / format, format, told=told.append)
    assert told == [f"{format}: 14 quantized weights, all to the bit."]
    back = convert(there, root / f"{format}-back", "awq")
    assert_same_files(awq_folder, back)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (awq_folder, back)]
    assert configs[0] == configs[1]


def test_several_formats_are_folders_in_one(awq_folder, root):
    out = convert(awq_folder, root / "several", "mlx,compressed-tensors")
    assert sorted(path.name for path in out.iterdir()) == ["awq_jax_files.json", "compressed-tensors", "mlx"]
    tokens = jnp.arange(12)[None]
    expected = awq.load(awq_folder).logits(tokens)
    for name in ("mlx", "compressed-tensors"):
        assert open_checkpoint(out / name).kind == name
        np.testing.assert_array_equal(awq.load(out / name).logits(tokens), expected)


def test_symmetric_weights_go_everywhere(symmetric, root):
    for format in ("gptq", "awq"):
        there = convert(symmetric, root / f"symmetric-{format}", format)
        back = convert(there, root / f"symmetric-{format}-back", "compressed-tensors", symmetric=True)
        assert_same_files(symmetric, back)


def test_zero_points_that_differ_are_refused_where_there_are_none(awq_folder, root):
    with pytest.raises(InputError, match=r"GPTQ files hold symmetric.*: give symmetric=True if .*requantize=True"):
        convert(awq_folder, root / "no", "gptq")
    with pytest.raises(InputError, match=r"_proj.weight has other zero points than the middle one.*requantize=True"):
        convert(awq_folder, root / "no", "gptq", symmetric=True)
    assert not (root / "no").exists()


def test_what_is_rounded_anew_is_told_and_near(awq_folder, root):
    told = []
    out = convert(awq_folder, root / "anew", "gptq", requantize=True, told=told.append)
    assert told == ["gptq: 14 quantized weights, 14 rounded anew."]
    for name, w in read_all(awq_folder).items():
        if is_quantized(w):
            other = open_checkpoint(out).read(name)
            assert other.spec == SYMMETRIC
            step = np.repeat(np.asarray(other.scales, np.float32), 32, axis=0)
            off = np.abs(np.asarray(w.dequantize(), np.float32) - np.asarray(other.dequantize(), np.float32))
            assert np.all(off <= step * 0.51)


def test_other_bits_need_to_be_rounded_anew(awq_folder, root):
    says = "has 4 bits in groups of 32, not 8 in 64: give requantize=True"
    with pytest.raises(InputError, match=says):
        convert(awq_folder, root / "no", "mlx", bits=8, group_size=64)
    out = convert(awq_folder, root / "eight", "mlx", bits=8, group_size=64, requantize=True)
    assert open_checkpoint(out).read(f"{DOWN}.weight").spec == QuantSpec(8, 64)


def test_widths_that_differ_are_kept_or_refused(root):
    others = {"down_proj": QuantSpec(8, 64), "layers.1.mlp.up_proj": None}
    mixed = rounded_folder(root / "mixed", "mlx", QuantSpec(4, 32), others=others)
    for format in ("compressed-tensors", "gptq_v2", "orbax"):
        there = convert(mixed, root / f"mixed-{format}", format)
        assert_same_files(mixed, convert(there, root / f"mixed-{format}-back", "mlx"))
    with pytest.raises(InputError, match=r"down_proj.weight: an AutoAWQ file has one width, 4 bits in groups of 32"):
        convert(mixed, root / "no", "awq")


def test_a_quantized_head_and_embedding_become_dense_where_readers_expect_it(root):
    """As mlx-lm writes them."""
    folder = rounded_folder(root / "head", "mlx", QuantSpec(4, 32))
    tensors = stored(folder)
    scale, codes = np.full((320, 2), 0.5, np.float16), np.arange(320 * 8, dtype=np.uint32).reshape(320, 8)
    for module in ("lm_head", "model.embed_tokens"):
        parts = {"weight": codes, "scales": scale, "biases": np.full((320, 2), -0.3, np.float16)}
        tensors |= {f"{module}.{part}": a for part, a in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    dense = open_checkpoint(folder).read("model.embed_tokens.weight")
    q = codes[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    np.testing.assert_allclose(dense, q.reshape(320, 64) * 0.5 - np.float16(0.3), rtol=1e-3)
    with pytest.raises(InputError, match="weight: readers of AutoAWQ files expect a dense head: give requant"):
        convert(folder, root / "no", "awq")
    told = []
    out = convert(folder, root / "head-awq", "awq", requantize=True, told=told.append)
    assert told == ["awq: 15 quantized weights, 1 rounded anew; made dense: model.embed_tokens.weight."]
    np.testing.assert_array_equal(stored(out)["lm_head.weight"], dense)
    with pytest.raises(InputError, match="weight has zero points that are no whole numbers, which compressed"):
        convert(folder, root / "no", "compressed-tensors")


@pytest.mark.parametrize("part", ["g_idx", "weight_g_idx"])
def test_rows_that_lie_apart_are_read_dense_and_kept_where_there_is_room(root, symmetric, part):
    source = convert(symmetric, root / f"apart-{part}", "gptq") if part == "g_idx" else root / "apart-ct"
    if part != "g_idx":
        shutil.copytree(symmetric, source)
    rows = np.random.default_rng(0).permutation(np.arange(128) // 32).astype(np.int32)
    tensors = stored(source) | {f"{DOWN}.{part}": rows}
    save_file(tensors, source / "model.safetensors")
    found = open_checkpoint(source)
    unread = replace(found.tensors[f"{DOWN}.weight"], codes=lambda: pytest.fail("unpacked to plan"))
    codes = found.tensors[f"{DOWN}.weight"].codes()
    assert stored_weights({DOWN: unread}).specs == {DOWN: (codes.q.shape, codes.spec)}
    expected = (codes.q - np.float32(8)) * codes.scale.astype(np.float32)[rows]
    np.testing.assert_array_equal(found.read(f"{DOWN}.weight"), expected.T.astype(np.float16))
    assert np.isfinite(awq.load(source).logits(jnp.arange(4)[None])).all()
    there = convert(source, root / f"apart-{part}-there", "gptq_v2")
    np.testing.assert_array_equal(stored(there)[f"{DOWN}.g_idx"], rows)
    with pytest.raises(InputError, match=r"rows that lie apart.*requantize=True"):
        convert(source, root / "no", "awq")


def test_a_dense_model_is_not_converted(awq_folder, root):
    with pytest.raises(InputError, match="dense is not quantized in a format"):
        convert(root / "dense", root / "no", "awq")
    with pytest.raises(InputError, match=r"to='awg': choose one of awq, .*did you mean awq"):
        convert(awq_folder, root / "no", "awg")


def test_steps_of_float32_are_not_narrowed_unless_asked_for(awq_folder, root):
    wide = root / "float32"
    shutil.copytree(awq_folder, wide)
    tensors = stored(awq_folder)
    exact = {name: w.astype(np.float32) for name, w in tensors.items() if name.endswith(".scales")}
    save_file(tensors | exact, wide / "model.safetensors")
    assert_same_files(awq_folder, convert(wide, root / "held", "awq"))
    save_file(tensors | {name: w * np.float32(1.0001) for name, w in exact.items()}, wide / "model.safetensors")
    ours = convert(wide, root / "float32-ours", "orbax")
    for source in (wide, ours):
        with pytest.raises(InputError, match=r"has steps in float32 that .*requantize=True"):
            convert(source, root / "no", "mlx,awq")
        told = []
        near = convert(source, root / f"{source.name}-near", "awq", requantize=True, told=told.append)
        assert told == ["awq: 14 quantized weights, 14 rounded anew."]
        assert_same_files(awq_folder, near)


@pytest.mark.parametrize("step", [np.nan, np.inf])
def test_steps_that_are_no_numbers_are_refused_by_name(awq_folder, root, step):
    broken = root / f"broken-{step}"
    shutil.copytree(awq_folder, broken)
    tensors = stored(awq_folder)
    tensors[f"{DOWN}.scales"][0, 0] = step
    save_file(tensors, broken / "model.safetensors")
    for format in ("mlx", "orbax"):
        with pytest.raises(InputError, match=rf"^{DOWN}.weight has steps that are NaN or infinite"):
            convert(broken, root / "no", format)
    assert not (root / "no").exists()


def test_steps_and_dense_tensors_keep_their_dtype(awq_folder, root):
    """GPTQModel writes AutoAWQ files in bfloat16."""
    import ml_dtypes

    wide = root / "wide"
    shutil.copytree(awq_folder, wide)
    tensors = {
        name: w.astype(ml_dtypes.bfloat16) if w.dtype == np.float16 else w for name, w in stored(awq_folder).items()
    }
    save_file(tensors, wide / "model.safetensors")
    back = convert(convert(wide, root / "wide-ct", "compressed-tensors"), root / "wide-back", "awq")
    assert_same_files(wide, back)


def test_a_broken_chat_template_is_told_and_copied(awq_folder, root):
    source, told = root / "broken_template", []
    shutil.copytree(awq_folder, source)
    (source / "chat_template.jinja").write_text("{% if %}")
    convert(source, root / "broken_template_mlx", "mlx", told=told.append)
    assert told[0].startswith("The chat template in chat_template.jinja is broken (line 1: Expected an expression")
    assert (root / "broken_template_mlx" / "chat_template.jinja").read_text() == "{% if %}"


@pytest.mark.parametrize(
    ("to", "asked", "says"),
    [
        ("awq", {"bits": 8}, r"bits=8 cannot be \(AutoAWQ files hold 4 bits, not 8"),
        ("mlx", {"bits": 7}, "bits=7 cannot be"),
        ("mlx", {"group_size": 128}, "k_proj.weight: group_size=128 cannot be"),
        ("mlx", {"group_size": 2**20}, "group_size=1048576 cannot be"),
        ("orbax", {"group_size": 2**20}, "group_size=1048576 is more than its 64 input features: give group_size=-1"),
    ],
)
def test_what_a_format_can_give_no_weight_is_refused(awq_folder, root, to, asked, says):
    with pytest.raises(InputError, match=says):
        convert(awq_folder, root / "no", to, **asked, requantize=True)

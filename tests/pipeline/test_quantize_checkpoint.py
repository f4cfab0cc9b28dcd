"""From a model on disk to a quantized model on disk, and back into memory."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import TEMPLATE, config, tensors, tiny_folder, tiny_gguf, tokenizer
from safetensors.numpy import load_file
from tiny import config_of, random_tokens

import awq_jax as awq
from awq_jax import Recipe, Rule
from awq_jax.errors import InputError
from awq_jax.formats.checkpoint import open_checkpoint
from awq_jax.formats.written import written_whole
from awq_jax.models.decoder import Decoder
from awq_jax.models.inputs import without_rows
from awq_jax.pipeline.decoder import lazy_params, stream_decoder
from awq_jax.pipeline.outputs import fitted, halved
from awq_jax.pipeline.quantize_checkpoint import computed_in
from awq_jax.search import Grid, no_clip, to_nearest
from awq_jax.transforms.quantize import fold_scales, plan
from awq_jax.weights.paths import named_leaves
from awq_jax.weights.tensor import is_quantized

QUICK = Recipe(group_size=32, scale=Grid(), clip=no_clip, rounding=to_nearest, gram_block=32)
"""Scales are searched for; nothing else takes time."""

TEXT = {"samples": 4, "seq_len": 128}
SITES = [f"attn/{x}/kernel" for x in "kqvo"] + [f"mlp/{x}/kernel" for x in ("gate", "up", "down")]
MADE = {
    "awq": {"recipe": Recipe(group_size=32), "format": "awq"},
    "orbax": {"recipe": replace(QUICK, bits=3, group_size=128), "format": "orbax"},
    "orbax, symmetric": {"recipe": replace(QUICK, symmetric=True), "format": "orbax"},
}
"""The name of a folder and how it was made; of 64 or 128 rows, groups of 128 leave some to pad."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def dense(root):
    return tiny_folder(root / "dense")


@pytest.fixture(scope="module")
def made(root, dense):
    """Folders by name, each made when it is first asked for."""
    done = {}

    def make(name):
        if name not in done:
            done[name] = awq.quantize_checkpoint(dense, root / name, **MADE[name], **TEXT)
        return done[name]

    return make


def unquantized(params):
    """The same params, dense."""
    wide = lambda w: replace(w, dtype=jnp.float32).dequantize() if is_quantized(w) else w
    return jax.tree.map(wide, params, is_leaf=is_quantized)


def logits(config, params, tokens):
    return np.asarray(Decoder(config).apply({"params": params}, tokens))


def assert_close(found, expected, tolerance):
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def assert_as_close_as_its_sites(found, expected, sites):
    """The relative error of all is about the sum of the sites' own; a wrong weight anywhere makes it 1 or more."""
    error = np.square(found - expected).mean() / np.square(expected).mean()
    allowed = 2 * sum(site.error for site in sites)
    assert 0 < error < allowed < 1.2


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", MADE)
def test_a_folder_computes_what_its_weights_say(made, name):
    model = awq.load(made(name).path)
    tokens = random_tokens(model.config, batch=2, length=40)
    expected = logits(model.config, unquantized(model.params), tokens)
    assert_close(np.asarray(model.logits(tokens)), expected, 1e-5)
    assert sum(map(is_quantized, named_leaves(model.params).values())) == 14


@pytest.mark.parametrize("name", MADE)
def test_a_folder_is_close_to_the_dense_model(made, dense, name):
    small, big = awq.load(made(name).path), awq.load(dense)
    tokens = random_tokens(big.config, batch=4, length=64)
    found, expected = np.asarray(small.logits(tokens)), np.asarray(big.logits(tokens))
    assert_as_close_as_its_sites(found, expected, made(name).sites)


def test_the_folded_model_is_the_model(dense):
    """Before anything is rounded: same logits on other text than the calibration's, to float precision."""

    def only(params, calibration, recipe):
        return fold_scales(params, calibration, recipe, plan(calibration, recipe))[0], ()

    big, layers = awq.load(dense), {}
    params = lazy_params(open_checkpoint(dense), big.family, big.config, wide=True)
    text = random_tokens(big.config, batch=4, length=128, seed=2)
    recipe = replace(QUICK, scales="folded")
    stream_decoder(big.config, params, text, recipe, layers.__setitem__, solve=only)
    assert layers.keys() == {"layers_0", "layers_1"}
    tokens = random_tokens(big.config, batch=2, length=64)
    assert_close(logits(big.config, big.params | layers, tokens), logits(big.config, big.params, tokens), 2e-5)
    for name, layer in layers.items():
        before, after = named_leaves(big.params[name]), named_leaves(layer)
        moved = {k for k in before if np.abs(after[k] / before[k] - 1).max() > 0.1}
        assert moved >= {"attn_norm/scale", "mlp_norm/scale", "attn/q/kernel", "attn/k/kernel", "mlp/gate/kernel"}


@pytest.mark.parametrize("name", MADE)
def test_the_report_stands_in_the_folder(made, name):
    done, recipe = made(name), MADE[name]["recipe"]
    report = json.loads((done.path / "quantization_report.json").read_text())
    assert {site["name"] for site in report} == {f"layers_{i}/{site}" for i in (0, 1) for site in SITES}
    for site, told in zip(report, done.sites, strict=True):
        spec = site.pop("spec")
        assert spec == {"bits": recipe.bits, "group_size": recipe.group_size, "symmetric": recipe.symmetric}
        assert site == {k: v for k, v in vars(told).items() if k != "spec"}
        assert 0 < site["error"] <= site["nearest_error"] * (1 + 1e-5) < 0.2


def test_seconds_are_told_by_stage(made):
    assert {"load", "statistics", "search", "write"} <= made("awq").seconds.keys()
    assert all(s >= 0 for s in made("awq").seconds.values())


def test_sizes_of_autoawq(made, dense):
    done = made("awq")
    hf = config()
    before = 4 * sum(w.size for w in tensors(hf).values())
    assert done.before == before
    sizes = [w.size for name, w in tensors(hf).items() if "_proj" in name]
    others = before // 4 - sum(sizes)
    # Four bits a weight; a float16 step and a 4-bit zero point for each of the 32 that share them.
    expected = sum(n // 2 + n // 32 * 2 + n // 64 for n in sizes) + 2 * others
    shards = [load_file(f) for f in sorted(done.path.glob("*.safetensors"))]
    assert sum(w.nbytes for shard in shards for w in shard.values()) == expected
    assert done.after == sum(map(len, files(done.path).values()))
    assert expected < done.after < expected + 40_000
    assert len(shards) == 1


@pytest.mark.parametrize(("name", "bits", "group"), [("orbax", 3, 128), ("orbax, symmetric", 4, 32)])
def test_sizes_of_orbax(made, name, bits, group):
    model = awq.load(made(name).path)
    symmetric = name != "orbax"
    for w in named_leaves(model.params).values():
        if is_quantized(w):
            i, o = w.shape
            groups = -(-i // group)
            zeros = 0 if symmetric else groups * o
            assert w.nbytes == groups * group * o * bits // 8 + 2 * groups * o + zeros + 4 * i
    stored = sum(w.nbytes for w in jax.tree.leaves(model.params))
    assert made(name).after < stored + 120_000


@pytest.mark.parametrize("name", MADE)
def test_tokenizer_and_configs_go_along(made, dense, name):
    out, text = made(name).path, "Hello, wörld 12"
    found, expected = awq.load(out).tokenizer, awq.load(dense).tokenizer
    assert found(text).input_ids == expected(text).input_ids
    assert found.chat_template == TEMPLATE
    assert (found.bos_token, found.eos_token) == ("<|im_start|>", "<|im_end|>")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / file).read_bytes() == (dense / file).read_bytes()
    kept = json.loads((out / "config.json").read_text())
    assert kept.items() >= config().items()
    if name == "awq":
        assert kept["quantization_config"] == {
            "quant_method": "awq",
            "zero_point": True,
            "group_size": 32,
            "bits": 4,
            "version": "gemm",
            "modules_to_not_convert": ["lm_head"],
        }
    else:
        assert (out / "awq_jax.json").exists()


def test_the_same_input_gives_the_same_bytes_from_one_file_or_from_shards(root, dense):
    # The model card names the folder.
    sharded = tiny_folder(root / "sharded" / dense.name, shards=3)
    one, two, three = (
        awq.quantize_checkpoint(model, root / f"out-{k}", QUICK, **TEXT)
        for k, model in enumerate((dense, dense, sharded))
    )
    assert files(one.path) == files(two.path) == files(three.path)
    assert one.before == three.before


def test_a_gguf_file_becomes_a_folder_that_is_complete(root):
    file = tiny_gguf(root / "m.gguf")
    nearest = replace(awq.PRESETS["rtn"], group_size=32)
    done = awq.quantize_checkpoint(file, root / "from gguf", nearest, **TEXT)
    small, big = awq.load(done.path), awq.load(file)
    tokens = random_tokens(big.config, batch=2, length=40)
    assert_close(np.asarray(small.logits(tokens)), logits(big.config, unquantized(small.params), tokens), 1e-5)
    assert_as_close_as_its_sites(small.logits(tokens), big.logits(tokens), done.sites)
    text = "hello 12 <|im_end|>"
    assert small.tokenizer(text).input_ids == big.tokenizer(text).input_ids
    assert small.tokenizer.chat_template == big.tokenizer.chat_template


def test_what_stays_dense_of_a_gguf_file_takes_two_bytes_a_weight(root):
    file = tiny_gguf(root / "halves.gguf")
    done = awq.quantize_checkpoint(file, root / "halves", QUICK, format="orbax", **TEXT)
    small, big = awq.load(done.path), awq.load(file)
    embedding = small.params["embed"]["embedding"]
    assert embedding.dtype == jnp.float16
    np.testing.assert_allclose(embedding, big.params["embed"]["embedding"], rtol=2**-11, atol=2**-25)
    assert small.params["norm"]["scale"].dtype == jnp.float32


def test_a_model_with_activations_beyond_float16_says_bfloat16(root):
    weights = tensors(config())
    louder = {name: w * np.float32(3e4) for name, w in weights.items() if name.endswith("0.mlp.down_proj.weight")}
    model = tiny_folder(root / "loud", weights=weights | louder)
    rtn = replace(awq.PRESETS["rtn"], group_size=32)
    done = awq.quantize_checkpoint(model, root / "loud-out", rtn, **TEXT)
    found = json.loads((done.path / "config.json").read_text())
    assert found["dtype"] == found["torch_dtype"] == "bfloat16"
    (note,) = done.notes
    assert re.match(r"Activations reach \d{5,} on the calibration text, float16 ends at 65504: config.json says", note)
    assert computed_in(32000.0) == ("float16", ())
    assert computed_in(40000.0)[0] == "bfloat16"


def test_dense_matrices_stay_wide_where_float16_would_lose_them():
    usual = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    zeros = usual * (np.arange(4)[:, None] > 0)
    tiny = usual * np.float32([[1], [1e-7], [1], [1]])
    found = halved({"a": usual, "b": zeros, "c": tiny, "d": usual * np.float32(1e6)})
    assert [found[k].dtype.name for k in "abcd"] == ["float16", "float16", "float32", "float32"]


@pytest.mark.parametrize(("dtype", "format"), [("bfloat16", "awq"), ("bfloat16", "orbax"), ("float16", "awq")])
def test_half_precision(root, dtype, format):
    half = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    weights = {name: w.astype(half) for name, w in tensors(config()).items()}
    model = tiny_folder(root / f"{dtype}-{format}", weights=weights, tie_word_embeddings=False)
    done = awq.quantize_checkpoint(model, root / f"{dtype}-{format}-out", QUICK, format=format, **TEXT)
    assert done.before == 2 * sum(w.size for w in weights.values())
    small, big = awq.load(done.path), awq.load(model)
    leaf = small.params["layers_0"]["mlp"]["up"]["kernel"]
    kept = jnp.float16 if format == "awq" else half
    assert leaf.dtype == small.params["norm"]["scale"].dtype == kept
    tokens = random_tokens(big.config, batch=2, length=40)
    assert_as_close_as_its_sites(small.logits(tokens), big.logits(tokens), done.sites)


def test_a_tied_head_stays_tied(root):
    model = tiny_folder(root / "tied", tie_word_embeddings=True)
    for format in ("awq", "orbax"):
        done = awq.quantize_checkpoint(model, root / f"tied-{format}", QUICK, format=format, **TEXT)
        small = awq.load(done.path)
        assert "head" not in small.params
        assert small.config.tied


@pytest.mark.parametrize("format", ["awq", "orbax"])
def test_skipped_sites_stay_dense(root, dense, format):
    recipe = replace(QUICK, rules=(Rule("mlp/down", skip=True), Rule("/o/kernel", skip=True)))
    done = awq.quantize_checkpoint(dense, root / f"skipped-{format}", recipe, format=format, **TEXT)
    small = named_leaves(awq.load(done.path).params)
    left = {f"layers_{i}/{site}/kernel" for i in (0, 1) for site in ("attn/o", "mlp/down")}
    dense_ones = {name for name, w in small.items() if w.ndim == 2 and not is_quantized(w)}
    assert dense_ones == left | {"embed/embedding", "head/kernel"}
    assert {site.name for site in done.sites}.isdisjoint(left)
    if format == "awq":
        kept = json.loads((done.path / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
        skipped = {f"model.layers.{i}.{linear}" for i in (0, 1) for linear in ("self_attn.o_proj", "mlp.down_proj")}
        assert set(kept) == skipped | {"lm_head"}


@pytest.mark.parametrize("format", ["awq", "orbax"])
def test_what_servers_make_one_matrix_of_stays_dense_together(root, dense, format):
    """vLLM: "some but not all shards of self_attn.qkv_proj are quantized"; SGLang asks for that name itself."""
    recipe = replace(QUICK, rules=(Rule("layers_0/attn/q", skip=True), Rule("mlp/gate", skip=True)))
    done = awq.quantize_checkpoint(dense, root / f"together-{format}", recipe, format=format, **TEXT)
    small = named_leaves(awq.load(done.path).params)
    quantized = {name for name, w in small.items() if is_quantized(w)}
    asked = {"layers_0/attn/q/kernel", "layers_0/mlp/gate/kernel", "layers_1/mlp/gate/kernel"}
    more = {"layers_0/attn/k/kernel", "layers_0/attn/v/kernel", "layers_0/mlp/up/kernel", "layers_1/mlp/up/kernel"}
    more = more if format == "awq" else set()
    assert quantized == {f"layers_{i}/{site}" for i in (0, 1) for site in SITES} - asked - more
    assert {site.name for site in done.sites if site.spec is None} == more
    if format == "awq":
        assert {site.note for site in done.sites if site.name.startswith("layers_0/mlp/up")} == {
            "left dense with layers_0/mlp/gate/kernel, as servers make one matrix of them"
        }
        assert done.notes[0].startswith("4 more matrices stay dense beside those that were skipped, ")
        kept = json.loads((done.path / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
        wholes = {"model.layers.0.self_attn.qkv_proj", *(f"model.layers.{i}.mlp.gate_up_proj" for i in (0, 1))}
        assert {name for name in kept if name.endswith(("qkv_proj", "gate_up_proj"))} == wholes
    else:
        assert done.notes == ()


def test_a_rule_may_name_a_layer(root, dense):
    recipe = replace(QUICK, rules=(Rule("^layers_1/mlp", skip=True),))
    done = awq.quantize_checkpoint(dense, root / "layer", recipe, format="orbax", **TEXT)
    skipped = {f"layers_1/mlp/{x}/kernel" for x in ("gate", "up", "down")}
    assert {site.name for site in done.sites} == {f"layers_{i}/{site}" for i in (0, 1) for site in SITES} - skipped


def test_fed_with_quantized_pieces_the_first_is_the_same_and_the_next_are_others(root, dense):
    outs = [
        awq.quantize_checkpoint(dense, root / f"feed-{feed}", QUICK, feed=feed, **TEXT)
        for feed in ("dense", "quantized")
    ]
    one, other = (load_file(done.path / "model.safetensors") for done in outs)
    same = lambda part: all((one[name] == other[name]).all() for name in one if f"layers.{part}" in name)
    assert [same(f"{i}.{part}") for i in (0, 1) for part in ("self_attn", "mlp")] == [True, False, False, False]


def test_calibration_on_what_the_model_writes_itself(root, dense):
    done = awq.quantize_checkpoint(dense, root / "self", QUICK, calib="self", **TEXT)
    again = awq.quantize_checkpoint(dense, root / "self again", QUICK, calib="self", **TEXT)
    assert files(done.path) == files(again.path)


def test_progress_goes_up_to_all_blocks_and_all_seconds_are_counted(root, dense):
    told = []
    start = time.perf_counter()
    options = {"format": "orbax", "average_bits": 3.5, "distill": 1} | TEXT
    done = awq.quantize_checkpoint(dense, root / "told", QUICK, progress=lambda *step: told.append(step), **options)
    assert sum(done.seconds.values()) == pytest.approx(time.perf_counter() - start, rel=0.03)
    assert {"load", "text", "survey", "trace", "statistics", "search", "distillation", "write"} == {*done.seconds}
    stages = list(dict.fromkeys(stage for stage, *_ in told))
    before = ["loading", "calibration text", "compiling, once"]
    assert stages == [*before, "block looked at", "group scored", "block", "distillation step"]
    for stage in stages:
        steps = [(k, n) for s, k, n in told if s == stage]
        assert steps[-1][0] == steps[-1][1]
    blocks = [(k, n) for stage, k, n in told if stage == "block"]
    assert blocks == sorted(blocks)
    assert blocks[-1] == (2, 2)


def test_overwrite_replaces_a_folder_whole(root, dense):
    out = root / "occupied"
    with written_whole(out) as scratch:
        (scratch / "old").write_text("0")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        awq.quantize_checkpoint(dense, out, QUICK, **TEXT)
    assert files(out)["old"] == b"0"
    awq.quantize_checkpoint(dense, out, QUICK, overwrite=True, **TEXT)
    assert "old" not in files(out)
    assert awq.load(out).generate("hi", max_new_tokens=2) is not None


def test_every_stop_token_of_either_config_ends_an_answer(root):
    model = tiny_folder(root / "stops", eos_token_id=[7, 8])
    assert awq.load(model).eos == (1, 7, 8)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert awq.load(model).eos == (1, 9, 7, 8)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id holds '</s>': expected the number"):
        awq.load(model)


def test_a_model_without_tokens_to_start_from_cannot_write_its_own_text(dense):
    model = awq.load(dense)
    nameless = replace(model, tokenizer=SimpleNamespace(bos_token_id=None, eos_token_id=None))
    with pytest.raises(ValueError, match=r"calib=.self.: the tokenizer names no first token"):
        nameless.sample(2, 8)
    assert model.sample(2, 8).shape == (2, 8)


def test_generation_answers_chats_and_continues_raw_text(dense):
    model = awq.load(dense)
    chat = model.generate("hello", max_new_tokens=8)
    assert chat == model.generate("hello", max_new_tokens=8)
    as_text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert chat == model.generate(as_text, max_new_tokens=8, chat=False)
    warm = [model.generate("hello", max_new_tokens=8, temperature=5.0, seed=seed) for seed in (0, 1)]
    assert warm[0] != warm[1]


def test_the_config_of_a_folder_is_that_of_the_model(made, dense):
    assert awq.load(made("awq").path).config == awq.load(dense).config == config_of(config())


def test_where_the_recipe_names_none_the_largest_group_that_divides_all_widths_is_taken(root, dense):
    done = awq.quantize_checkpoint(dense, root / "no recipe", awq.Recipe(), **TEXT)
    assert done.recipe.group_size == 64
    (read,) = done.calibration
    assert read.used == TEXT["samples"] * TEXT["seq_len"]


@pytest.mark.parametrize(
    ("widths", "rules", "format", "group"),
    [
        ((64, 128), (), "awq", 64),
        ((96, 128), (), "awq", 32),
        ((128, 256), (), "awq", 128),
        ((48, 128), (), "orbax", 128),
        ((48, 128), (Rule("s0", skip=True),), "awq", 128),
        ((96, 128), (Rule("s0", group_size=32),), "orbax", 128),
    ],
)
def test_the_group_that_fits(widths, rules, format, group):
    shapes = {f"s{k}": (i, 8) for k, i in enumerate(widths)}
    recipe, why = fitted(Recipe(rules=rules), shapes, [format])
    assert recipe.group_size == group
    assert why.startswith(f"Groups of {group}")


def test_tokens_that_the_embedding_has_no_rows_for_are_told():
    line = without_rows(SimpleNamespace(vocab=318), tokenizer())
    assert line is not None
    assert "The tokenizer has 2 tokens beyond the embedding's 318 rows" in line
    assert [without_rows(SimpleNamespace(vocab=n), tokenizer()) for n in (320, 384)] == [None, None]


def test_no_group_fits():
    says = r"No group size of 128, 64, 32 divides all widths \(48, 64\).*format='orbax', which pads"
    with pytest.raises(InputError, match=says):
        fitted(Recipe(), {"a": (48, 8), "b": (64, 8)}, ["awq"])

"""Distilling a decoder whose blocks were quantized one by one."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import tiny_folder
from commands import run
from tiny import config_of, hf_config, random_params

import awq_jax as awq
from awq_jax import memory
from awq_jax.compat import adam
from awq_jax.memory import to_be_read
from awq_jax.pipeline.calibration_text import calibration_tokens
from awq_jax.pipeline.distill_decoder import logits, nbytes, shuffled, together
from awq_jax.transforms.distill import _step, kl_of_logits
from awq_jax.weights.paths import named_leaves
from awq_jax.weights.tensor import is_quantized, round_to_nearest

OPTIONS = ("--group-size", "32", "--samples", "8", "--seq-len", "64", "--preset", "rtn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model") / "in")


@pytest.mark.parametrize("options", [("--format", "awq"), ("--format", "orbax", "--bits", "3")], ids=["awq", "orbax"])
def test_the_command_distills(folder, tmp_path, options):
    dense, small = awq.load(folder), {}
    tokens = calibration_tokens(None, dense.tokenizer, samples=8, seq_len=64)
    for passes in (0, 40):
        out = run("quantize", folder, tmp_path / str(passes), *OPTIONS, *options, "--distill", passes)
        assert out.code == 0, out.err
        small[passes] = awq.load(tmp_path / str(passes))
    before, after = (float(kl_of_logits(dense.logits(tokens), small[k].logits(tokens))) for k in (0, 40))
    assert after < 0.97 * before
    leaves, tuned = (named_leaves(small[k].params) for k in (0, 40))
    assert leaves.keys() == tuned.keys()
    for name, w in leaves.items():
        if is_quantized(w):
            np.testing.assert_array_equal(w.codes, tuned[name].codes)
    assert json.loads((tmp_path / "40" / "quantization_report.json").read_text())


def test_what_it_takes_is_told_before_any_work(tmp_path, monkeypatch):
    config = config_of(hf_config(num_hidden_layers=4))
    params, tokens = random_params(config), jnp.zeros((8, 128), jnp.int32)
    shapes = jax.eval_shape(lambda: params)
    dense = {"outer": {k: params[k] for k in ("embed", "norm", "head")}}
    dense |= {"layers": together([params[f"layers_{i}"] for i in range(4)])}
    is_matrix = lambda path, w: round_to_nearest(w, awq.QuantSpec(4, 32)) if path[-1].key == "kernel" else w
    small = dense | {"layers": jax.tree_util.tree_map_with_path(is_matrix, dense["layers"])}
    factors = jax.tree.map(
        lambda w: jnp.zeros(w.scales.shape) if is_quantized(w) else None, small, is_leaf=is_quantized
    )
    optimizer, run = adam(1e-3), logits(config)
    step = jax.jit(functools.partial(_step, run, optimizer, kl_of_logits))
    lowered = step.lower(dense, small, factors, optimizer.init(factors), (tokens,))
    taken = lowered.compile().memory_analysis().temp_size_in_bytes
    found = nbytes(config, shapes, 8, 128)
    beside = found - 2 * to_be_read(jax.eval_shape(lambda: dense["layers"])) - to_be_read(shapes["embed"])
    assert 0.5 < beside / taken < 2, (beside, taken)
    monkeypatch.setattr(memory, "free_memory", lambda: found // 100)
    with pytest.raises(ValueError, match=r"distill=1 with seq_len=64 takes about .* GB are free: leave it out"):
        awq.quantize_checkpoint(tiny_folder(tmp_path / "in"), tmp_path / "out", samples=8, seq_len=64, distill=1)


def test_every_pass_sees_every_sequence_once():
    steps = list(shuffled(9, 2, 3))
    assert len(steps) == 12
    for k in range(3):
        assert len(set(np.concatenate(steps[4 * k : 4 * k + 4]).tolist())) == 8


def test_layers_that_differ_stay_a_list():
    same, other = {"w": np.ones((3, 4))}, {"w": np.ones((3, 5))}
    assert together([same, same])["w"].shape == (2, 3, 4)
    assert isinstance(together([same, other]), list)

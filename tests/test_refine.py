"""Distilling a decoder whose blocks were quantized one by one."""

import json

import numpy as np
import pytest
from checkpoints import tiny_folder
from commands import run

import awq_jax as awq
from awq_jax.calib import calibration_tokens
from awq_jax.distill import kl_of_logits
from awq_jax.paths import named_leaves
from awq_jax.refine import shuffled, together
from awq_jax.tensor import is_quantized

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


def test_every_pass_sees_every_sequence_once():
    steps = list(shuffled(9, 2, 3))
    assert len(steps) == 12
    for k in range(3):
        assert len(set(np.concatenate(steps[4 * k : 4 * k + 4]).tolist())) == 8


def test_layers_that_differ_stay_a_list():
    same, other = {"w": np.ones((3, 4))}, {"w": np.ones((3, 5))}
    assert together([same, same])["w"].shape == (2, 3, 4)
    assert isinstance(together([same, other]), list)

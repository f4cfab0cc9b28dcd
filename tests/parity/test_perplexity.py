"""Perplexity and KL of `evaluate` against transformers on torch, in float64, on the same windows."""

import numpy as np
import pytest
import torch
from checkpoints import config, tensors, tiny_folder, tokenizer
from transformers import AutoModelForCausalLM

import awq_jax as awq
from awq_jax.commands.demo import evaluation_text


def log_chances(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        return torch.log_softmax(model(torch.from_numpy(tokens).long()).logits, -1).numpy()


@pytest.mark.parametrize("stride", [64, 32])
def test_figures_are_those_of_torch(tmp_path, stride):
    rng = np.random.default_rng(0)
    noisy = {n: w + 0.1 * w.std() * rng.normal(size=w.shape).astype("f") for n, w in tensors(config()).items()}
    dense, other = tiny_folder(tmp_path / "dense"), tiny_folder(tmp_path / "other", weights=noisy)
    (tmp_path / "a.txt").write_text(text := evaluation_text()[:3000])
    numbers = {"windows": 3, "length": 64, "stride": stride}
    found = awq.evaluate(other, tmp_path / "a.txt", dense, **numbers)[str(other)][str(tmp_path / "a.txt")]
    ids = np.array(tokenizer()(text, add_special_tokens=False).input_ids)
    windows = np.stack([ids[k * stride : k * stride + 64] for k in range(3)])
    mine, theirs = log_chances(other, windows)[:, :-1], log_chances(dense, windows)[:, :-1]
    counts = np.ones((3, 63), bool)
    counts[1:, : 63 - stride] = False
    loss = -np.take_along_axis(mine, windows[:, 1:, None], -1)[..., 0][counts]
    kl = (np.exp(theirs) * (theirs - mine)).sum(-1)[counts]
    assert found.tokens == counts.sum()
    assert found.perplexity == pytest.approx(np.exp(loss.mean()), rel=1e-4)
    assert found.kl == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=1e-3)

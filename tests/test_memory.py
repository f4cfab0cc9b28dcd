"""What does not fit is refused before it starts."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from checkpoints import tiny_folder, tokenizer
from commands import run
from tiny import config_of, hf_config, random_params

from awq_jax import memory
from awq_jax.formats.checkpoint import Checkpoint
from awq_jax.models import decoder
from awq_jax.models.families.llama import LLAMA
from awq_jax.models.generate import generate, nbytes, stream
from awq_jax.pipeline.load import Model


def test_the_estimate_is_about_what_xla_takes():
    config = config_of(hf_config())
    params, hidden = random_params(config)["layers_0"], jax.ShapeDtypeStruct((1, 2048, config.width), jnp.float32)
    block = partial(decoder.block, config.layers[0])
    taken = jax.jit(block).lower(params, hidden).compile().memory_analysis().temp_size_in_bytes
    assert 0.6 < memory.matmul_bytes(block, params, hidden) / taken < 1.5


@pytest.mark.parametrize(("free", "refused"), [(0, False), (99, True), (101, False)])
def test_what_does_not_fit_is_refused_where_that_can_be_told(monkeypatch, free, refused):
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    if refused:
        with pytest.raises(ValueError, match=r"The work takes about 0\.0 GB of memory and 0\.0 GB are free: do less"):
            memory.check_memory("The work", 100, "do less")
    else:
        memory.check_memory("The work", 100, "do less")


def test_a_cache_that_does_not_fit_is_refused_before_the_first_token(monkeypatch):
    config = config_of(hf_config(max_position_embeddings=10**7))
    params, tokens = random_params(config), jnp.zeros((1, 5), jnp.int32)
    a_position = len(config.layers) * 2 * config.layers[0].kv_heads * config.layers[0].head_dim * 4
    assert 1 < nbytes(config, params, 1, 5, 10**6) / (10**6 * a_position) < 1.2
    monkeypatch.setattr(memory, "free_memory", lambda: 10**8)
    with pytest.raises(ValueError, match=r"max_new_tokens=1000000 after a prompt of 5 takes about .* give fewer"):
        stream(config, params, tokens[0], max_new_tokens=10**6)
    with pytest.raises(ValueError, match="max_new_tokens=1000000 after 1 prompts of 5 takes about"):
        generate(config, params, tokens, max_new_tokens=10**6)
    with pytest.raises(ValueError, match=r"calib='self' with samples=100000 sequences of seq_len=512 tokens takes"):
        Model(LLAMA, config, params, tokenizer()).sample(100_000, 512)


def test_commands_refuse_what_memory_does_not_hold(tmp_path, monkeypatch):
    model = tiny_folder(tmp_path / "m")
    (tmp_path / "a.txt").write_text("some words " * 1000)
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    done = run("quantize", model, tmp_path / "out", "--group-size", "32", "--samples", "2", "--seq-len", "64")
    assert done.code == 2
    assert "Calibration on --samples 2 sequences of --seq-len 64 tokens takes about" in done.err
    assert done.err.strip().endswith("GB are free: give shorter ones, or fewer.")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Checkpoint, "params", lambda *args: pytest.fail("weights were read"))
    done = run("generate", model, "Hi", "--max-new-tokens", "9")
    assert done.code == 2
    assert "--max-new-tokens 9 after a prompt of" in done.err
    done = run("eval", model, tmp_path / "a.txt", "--length", "64", "--windows", "1")
    assert done.code == 2
    assert "A window of --length 64 takes about" in done.err

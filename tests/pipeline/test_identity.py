"""Which checkpoint a folder holds."""

import pytest

from awq_jax.pipeline.identity import digest_of


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "model.safetensors", "params/0"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.parametrize("name", ["README.md", ".gitattributes", ".cache/huggingface/x", "q/config.json"])
def test_what_is_not_of_the_model(folder, name):
    before = digest_of(folder)
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text("new")
    assert digest_of(folder) == before


def test_a_model_below_has_all_its_files(folder):
    before = digest_of(folder)
    (folder / "q" / "params").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "params/0"):
        (folder / "q" / name).write_text("new")
    assert digest_of(folder) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "params/0", "params/1", "tokenizer.json"])
def test_what_is_of_the_model(folder, name):
    before = digest_of(folder)
    (folder / name).write_text("new")
    assert digest_of(folder) != before

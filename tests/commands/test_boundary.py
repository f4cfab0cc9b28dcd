"""What foreign files do to the code that reads them, and how a command ends: one line, whatever was raised."""

import json
import os
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from checkpoints import tiny_folder, tokenizer
from commands import run
from tokenizers import Tokenizer, decoders, models, processors

from awq_jax import cache, files, text
from awq_jax.commands import ending
from awq_jax.errors import InputError, one_line, reading
from awq_jax.formats import huggingface
from awq_jax.formats.checkpoint import open_checkpoint
from awq_jax.pipeline import load
from awq_jax.text import decode, encode, unprinted


def raised(error):
    with pytest.raises(BaseException) as e, reading("m/a.json cannot be read", "download it again"):  # noqa: PT011
        raise error
    return e.value


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (Exception("data did not\n match"), "m/a.json cannot be read (data did not match): download it again."),
        (KeyError("rope"), "m/a.json cannot be read (KeyError: 'rope'): download it again."),
        (ZeroDivisionError(), "m/a.json cannot be read (ZeroDivisionError: ZeroDivisionError): download it again."),
        (RecursionError("too deep"), "m/a.json cannot be read (too deep): download it again."),
        (OSError("no tokenizer there"), "m/a.json cannot be read (no tokenizer there): download it again."),
        (
            type("PanicException", (BaseException,), {})("unwrap"),
            "m/a.json cannot be read (unwrap): download it again.",
        ),
    ],
)
def test_whatever_a_parser_raises_is_one_line(error, says):
    found = raised(error)
    assert isinstance(found, InputError)
    assert str(found) == says


@pytest.mark.parametrize(
    "error",
    [
        InputError("said"),
        PermissionError(13, "denied"),
        KeyboardInterrupt(),
        SystemExit(1),
        GeneratorExit(),
        MemoryError("Unable to allocate 9 TiB"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"),
    ],
)
def test_what_needs_no_word_passes(error):
    assert raised(error) is error


def test_a_line_has_a_bound():
    assert one_line("a\n b", 10) == "a b"
    assert one_line("x" * 99, 10) == "x" * 10 + "..."


CASES = {
    "input": (InputError("m: repair\nit."), 2, "awq-jax: m: repair it.\n"),
    "a file": (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "a.txt: No such file or directory.\n"),
    "a disk": (OSError(28, "No space left on device"), 2, "awq-jax: No space left on device.\n"),
    "memory": (MemoryError(), 2, "awq-jax: memory ran out (MemoryError): give smaller"),
    "jax": (
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes"),
        2,
        "memory ran out (RESOURCE_EXHAUSTED: 9 bytes)",
    ),
    "XLA": (
        jax.errors.JaxRuntimeError("INTERNAL: Out of memory allocating 9 bytes."),
        2,
        "awq-jax: memory ran out (INT",
    ),
    "ours": (
        KeyError("layers"),
        1,
        "awq-jax: KeyError: 'layers'. This is a fault of awq_jax: report what AWQ_JAX_TRACE",
    ),
    "a panic": (type("PanicException", (BaseException,), {})("unwrap"), 1, "awq-jax: PanicException: unwrap. This is"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_command_ends_with_one_line(monkeypatch, case):
    error, code, says = CASES[case]
    monkeypatch.setattr("awq_jax.commands.cli.Doctor.run", lambda self: (_ for _ in ()).throw(error))
    done = run("doctor")
    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1)
    assert says in done.err
    monkeypatch.setenv(ending.TRACEBACK, "1")
    with pytest.raises(type(error)):
        run("doctor")


def test_a_reader_that_has_gone_is_no_error(monkeypatch, tmp_path):
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert ending.failed(BrokenPipeError(32, "Broken pipe")) == 1
        out.write("goes nowhere")
    assert (tmp_path / "out").read_text() == ""


def test_a_user_without_a_home_is_told_or_does_without(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    cache.keep_compiled_programs()
    found = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", before)
    assert found is None
    with pytest.raises(InputError, match="set XDG_CACHE_HOME to a folder"):
        cache.cache()


@pytest.fixture
def model(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "secret").write_text("{}")
    return tmp_path / "m"


def test_only_files_of_the_folder_are_opened(model, tmp_path):
    assert files.inside(model, "config.json") == model / "config.json"
    assert files.inside(model, "absent") is None
    (model / "a").symlink_to("config.json")
    assert files.inside(model, "a") == model / "a"
    (model / "b").symlink_to(tmp_path / "secret")
    for name in ("b", "../secret", str(tmp_path / "secret"), "../absent"):
        with pytest.raises(InputError, match=r"outside of the model's folder: put a copy of the file there"):
            files.inside(model, name)
    (model / "c").symlink_to("nothing")
    with pytest.raises(InputError, match="which is not there: finish the download"):
        files.inside(model, "c")
    (model / "d").symlink_to("d")
    with pytest.raises(InputError):
        files.inside(model, "d")
    with pytest.raises(InputError):
        files.inside(model, "a\0b")


def test_a_folder_that_is_a_link_and_the_hubs_cache_are_read(model, tmp_path):
    (tmp_path / "link").symlink_to(model)
    assert files.inside(tmp_path / "link", "config.json") is not None
    blob = tmp_path / "hub" / "models--org--m" / "blobs" / "0123"
    blob.parent.mkdir(parents=True)
    blob.write_text("{}")
    snapshot = tmp_path / "hub" / "models--org--m" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/0123")
    (model / "generation_config.json").symlink_to(blob)  # what downloads into a folder once made
    (tmp_path / "latest").symlink_to(snapshot)
    for folder, name in (
        (snapshot, "config.json"),
        (tmp_path / "latest", "config.json"),
        (model, "generation_config.json"),
    ):
        assert files.inside(folder, name) is not None


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "device"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"])
def test_what_is_no_file_is_refused_and_waits_for_nobody(tmp_path, kind, name):
    m = tiny_folder(tmp_path / "m") if name == "generation_config.json" else tmp_path / "m"
    m.mkdir(exist_ok=True)
    (m / name).unlink(missing_ok=True)
    if name != "config.json":
        (m / "config.json").write_text("{}")
    if kind == "pipe":
        os.mkfifo(m / name)
    elif kind == "folder":
        (m / name).mkdir()
    elif kind == "device":
        (m / name).symlink_to("/dev/zero")
    else:
        here = Path.cwd()
        os.chdir(m)  # the path of a socket is short
        try:
            with socket.socket(socket.AF_UNIX) as s:
                s.bind(name)
        finally:
            os.chdir(here)
    says = "outside of the model's folder" if kind == "device" else rf"{name} is a {kind}: give a file"
    with pytest.raises(InputError, match=says):
        huggingface.tokenizer_files(m) if name == "tokenizer.json" else open_checkpoint(m).companions


def test_a_model_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(InputError, match=r"m.gguf is a pipe: give a file"):
        open_checkpoint(tmp_path / "m.gguf")


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path):
    m = tiny_folder(tmp_path / "m")
    (m / "model.safetensors").rename(tmp_path / "w.safetensors")
    for shard in ("../w.safetensors", str(tmp_path / "w.safetensors")):
        (m / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(InputError, match="outside of the model's folder"):
            open_checkpoint(m)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[" * 200 + b"]" * 200, "a.json is not JSON .nested more than 100 deep.: download it again"),
        (b"[" * 100_000, "a.json is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a.json is not JSON"),
        (b'{"a": "\xff"}', "a.json is not text in UTF-8"),
        (b"[]", "a.json holds a list, not an object"),
        (b" " * 1001, "a.json has 1001 bytes, 1000 at most are read"),
    ],
)
def test_json_that_is_refused(tmp_path, monkeypatch, content, says):
    if content.startswith(b" "):
        monkeypatch.setattr(files, "LARGEST", 1000)
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=says):
        files.read_json(tmp_path / "a.json")


def test_byte_order_marks_are_no_matter(tmp_path):
    m = tiny_folder(tmp_path / "m")
    expected = open_checkpoint(m).tokenizer()("some text").input_ids
    for file in (*m.glob("*.json"), *m.glob("*.jinja")):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    found = open_checkpoint(m)
    assert found.config["vocab_size"] == 320
    assert found.tokenizer()("some text").input_ids == expected
    assert found.tokenizer().chat_template == tokenizer().chat_template


def test_lone_surrogates_stay_what_they_are(tmp_path):
    (tmp_path / "a.json").write_text('{"a": "\\ud800é"}')
    found = files.read_json(tmp_path / "a.json")
    huggingface.write_json(tmp_path / "b.json", found)
    assert files.read_json(tmp_path / "b.json") == found


def test_a_tokenizer_that_takes_far_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(text, "SECONDS", 0.25)
    asked = []

    def slow(words, **options):
        asked.append(len(words))
        time.sleep(0.3 if len(words) == 64 else 0)
        return SimpleNamespace(input_ids=[1] * (len(words) if len(words) < 512 else 10**6))

    with pytest.raises(InputError, match=r"64 characters of it take 0\.\d s and give 64 tokens\): repair"):
        encode(slow, "a" * 10_000)
    assert asked == [8, 64]
    assert len(encode(slow, "a" * 511)) == 511
    with pytest.raises(InputError, match=r"512 characters of it take .* give 1000000 tokens"):
        encode(lambda words, **options: slow(words + "a", **options), "a" * 10_000)


def test_a_tokenizer_that_fills_the_memory_with_a_letter_is_refused(tmp_path):
    m = tiny_folder(tmp_path / "m")
    found = json.loads((m / "tokenizer.json").read_text())
    ten = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    found["normalizer"] = {"type": "Sequence", "normalizers": [ten] * 10}
    (m / "tokenizer.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match=r"\(it replaces a letter by 10000000000\): copy a tokenizer.json of"):
        open_checkpoint(m).tokenizer()


def test_a_text_that_is_none_is_not_the_tokenizers_fault():
    asked = os.fsdecode(b"caf\xe9")
    model = load.Model(None, None, None, tokenizer())
    for chat in (True, False):
        with pytest.raises(
            InputError, match=r"The text holds '\\udce9', which UTF-8 does not have, at letter \d+: give"
        ):
            model.tokens_of(asked, chat=chat)


def test_a_tokenizer_that_fails_is_one_line(capfd):
    backend = Tokenizer(models.BPE({"a": 0}, []))
    backend.post_processor = processors.TemplateProcessing(single="a $A", special_tokens=[("a", 7)])
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert encode(fast, "aa").tolist() == [0, 0]
    with pytest.raises(InputError, match=r"tokenizer cannot encode the text .*: repair or"):
        encode(lambda words, **options: fast.decode(words), "a")
    backend.decoder = decoders.ByteFallback()
    assert decode(PreTrainedTokenizerFast(tokenizer_object=backend), encode(fast, "a")) == "a"
    capfd.readouterr()


def test_what_is_written_to_the_error_stream_comes_out_unless_the_block_fails(capfd):
    with unprinted():
        os.write(2, b"a warning\n")
    with pytest.raises(TypeError), unprinted():
        int(os.write(2, b"thread panicked\n"), 10)
    assert capfd.readouterr().err == "a warning\n"

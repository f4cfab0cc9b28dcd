"""What benchmarks/fuzz.py damages and reads: small models in every format, some large files, texts, reports, cards."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/helpers"))

CHAT = [{"role": "user", "content": "hi"}]
TEXT = "Some words of a text that is long enough. " * 40
TOKENIZER = ("tokenizer", "chat", "vocab", "merges", "special_tokens", "added_tokens")
CARD = "---\nlanguage:\n- en\nlicense: apache-2.0\ntags: [a, b]\nbase_model: 'org/model'\n---\n\n# A model\n\nProse.\n"
FOREIGN = ("mine", "x", "elsewhere/config.json")
MANIFEST = "awq_jax_files.json"
MANY = 100_000
"""Rows of an embedding that takes some tens of MB."""


@dataclass(frozen=True)
class Reader:
    """What makes a file or a folder; what reads it, told which file is damaged; which may be; whether it writes."""

    make: Callable[[Path], Path]
    read: Callable[[Path, Path], None]
    damages: Callable[[Path], bool] = lambda file: True
    writes: bool = False


def tiny(folder: Path, **changes: Any) -> Path:
    from checkpoints import tiny_folder

    return tiny_folder(folder / "model", intermediate_size=64, num_hidden_layers=1, **changes)


def quantized(folder: Path, format: str, **changes: Any) -> Path:
    """A folder with one quantized matrix, rounded to nearest: a search would take long to compile."""
    from awq_jax import QuantSpec, Recipe
    from awq_jax.formats import orbax
    from awq_jax.formats.checkpoint import open_checkpoint
    from awq_jax.formats.codecs import AUTOAWQ
    from awq_jax.formats.quantized_writer import Writer
    from awq_jax.pipeline.load import architecture
    from awq_jax.weights.tensor import round_to_nearest

    checkpoint = open_checkpoint(tiny(folder, **changes))
    family, config = architecture(checkpoint)
    recipe, out = Recipe(bits=4, group_size=32), folder / format
    out.mkdir()
    writer: Any = orbax.Writer(out, checkpoint, recipe)
    if format == "awq":
        writer = Writer(AUTOAWQ, out, checkpoint, recipe.spec)
    params = checkpoint.params(family, config)
    down = params["layers_0"]["mlp"]["down"]
    down["kernel"] = round_to_nearest(down["kernel"], QuantSpec(4, 32))
    for part in params:
        writer.write(part, family.to_names({part: params[part]}) if format == "awq" else params[part])
    writer.finish()
    return out


def gguf(folder: Path) -> Path:
    from checkpoints import tiny_gguf

    return tiny_gguf(folder / "model.gguf")


def all_kinds(folder: Path) -> Path:
    for part in ("awq", "orbax", "all"):
        (folder / part).mkdir()
    gguf(folder / "all")
    quantized(folder / "awq", "awq").rename(folder / "all" / "awq")
    quantized(folder / "orbax", "orbax").rename(folder / "all" / "orbax")
    tiny(folder).rename(folder / "all" / "huggingface")
    return folder / "all"


def params(folder: Path) -> Path:
    """What save_params writes: an array, a quantized weight, one with an input scale."""
    import jax.numpy as jnp

    from awq_jax import QuantSpec, save_params
    from awq_jax.weights.tensor import round_to_nearest, with_input_scale

    w = jnp.asarray(np.random.default_rng(0).normal(size=(40, 6)), jnp.float32)
    scaled = with_input_scale(round_to_nearest(w[:32], QuantSpec(4, 32)), w[:32, 0])
    save_params(folder / "params", {"bias": w[0], "a": {"kernel": round_to_nearest(w, QuantSpec(3, 32))}, "b": scaled})
    return folder / "params"


def old_tokenizer(folder: Path) -> Path:
    """A tokenizer in the files that came before tokenizer.json."""
    model = tiny(folder)
    kept = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").unlink()
    (model / "vocab.json").write_text(json.dumps(kept["model"]["vocab"]))
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in kept["model"]["merges"])
    (model / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "bos_token": "!"}))
    (model / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "!", "special": True}}))
    (model / "added_tokens.json").write_text(json.dumps({"<new>": 320}))
    (model / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0]['content'] }}"}))
    return model


def calibration(folder: Path) -> Path:
    rows = [{"messages": [{"role": "system", "content": "Be kind."}, *CHAT]}, {"text": TEXT}]
    rows += [{"conversations": [{"from": "human", "value": "hi"}]}, {"instruction": "a", "input": "b", "output": TEXT}]
    rows += [{"messages": CHAT, "tools": [{"name": "clock"}]}, {"prompt": [*CHAT], "completion": "yes"}]
    texts = folder / "texts"
    texts.mkdir()
    (texts / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (texts / "a.json").write_text(json.dumps({"rows": rows}))
    (texts / "a.csv").write_text(f"prompt,response\nhi,{TEXT}\n")
    (texts / "a.tsv").write_text(f'system\tquestion\tanswer\nBe kind.\t"hi, ""you"""\t{TEXT}\n')
    (texts / "a.txt").write_text(TEXT)
    parquet(texts / "a.parquet", rows[1:2] * 3)
    return texts


def parquet(file: Path, rows: list[Any]) -> None:
    """Writes a Parquet file where pyarrow is installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def large_texts(folder: Path) -> Path:
    """Calibration files of some tens of MB."""
    texts = folder / "texts"
    texts.mkdir()
    rows = [{"instruction": f"{k}", "output": TEXT} for k in range(10_000)]
    (texts / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (texts / "a.json").write_text(json.dumps(rows))
    (texts / "a.csv").write_text("prompt,response\n" + "".join(f"{k},{TEXT}\n" for k in range(10_000)))
    (texts / "a.txt").write_text(TEXT * 10_000)
    parquet(texts / "a.parquet", [row | {"more": np.random.default_rng(0).bytes(1000)} for row in rows])
    return texts


def large_gguf(folder: Path) -> Path:
    """A model with a large vocabulary."""
    from folders import llama_weights, write_gguf
    from vocabularies import byte_level

    vocabulary, more = byte_level(), [f"<{k}>" for k in range(MANY // 2)]
    for key, values in (("tokens", more), ("token_type", [1] * len(more))):
        vocabulary[f"tokenizer.ggml.{key}"] = [*vocabulary[f"tokenizer.ggml.{key}"], *values]
    rows = len(vocabulary["tokenizer.ggml.tokens"])
    embedding = np.random.default_rng(0).normal(size=(rows, 256)).astype(np.float32)
    write_gguf(folder / "model.gguf", llama_weights() | {"token_embd.weight": embedding}, changes=vocabulary)
    return folder / "model.gguf"


def report(folder: Path) -> Path:
    from awq_jax.pipeline.report import REPORT
    from awq_jax.transforms.quantize import SiteReport
    from awq_jax.weights.spec import QuantSpec

    names = ("layers_0/attn/q/kernel", "layers_0/mlp/up/kernel")
    sites = [asdict(SiteReport(name, QuantSpec(4, 32), 0.01, 0.02)) for name in names]
    (folder / "report").mkdir()
    (folder / "report" / REPORT).write_text(json.dumps(sites))
    return folder / "report"


def model_card(folder: Path) -> Path:
    (folder / "model").mkdir()
    (folder / "model" / "README.md").write_text(CARD)
    return folder / "model"


def outputs(folder: Path) -> Path:
    """Two outputs, one with files of somebody else in it, and files of somebody else around."""
    from awq_jax.formats.written import written_whole

    home = folder / "home"
    for name in ("ours", "mixed"):
        with written_whole(home / name) as new:
            fill(new, "old")
    for file in (*FOREIGN, "mixed/x", "mixed/config.json"):
        (home / file).parent.mkdir(exist_ok=True)
        (home / file).write_text(f"mine: {file}")
    return home


def cut_short(folder: Path) -> Path:
    """For each move what a run leaves that was killed before it, with files of somebody else around and in between."""
    from unittest.mock import patch

    from awq_jax.formats import moves, scratch, written

    rename = Path.rename
    for moved in range(8):
        home, left = folder / "runs" / str(moved), iter(range(moved))

        def killed(file: Path, to: Path, left: Any = left) -> Path:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return rename(file, to)

        with written.written_whole(home / "out") as new:
            fill(new, "old")
        with (
            patch.object(written, "exchange", lambda a, b: False),
            patch.object(moves, "take_back"),
            patch.object(scratch, "discard"),
            suppress(KeyboardInterrupt),
            written.written_whole(home / "out", overwrite=True) as new,
        ):
            fill(new, "new")
            (new / "more").write_text("new")
            Path.rename = killed
        Path.rename = rename
        for file in (*FOREIGN, "out/x", "out/y/x"):
            (home / file).parent.mkdir(exist_ok=True)
            (home / file).write_text(f"mine: {file}")
    return folder / "runs"


def fill(new: Path, what: str) -> None:
    (new / "params").mkdir()
    for file in ("config.json", "params/0", "model"):
        (new / file).write_text(f"{what}: {file}")


def read_model(path: Path, changed: Path) -> None:
    """What `load` and `quantize` read of a model; of one whose tokenizer alone is damaged, the tokenizer alone."""
    from awq_jax.formats.checkpoint import open_checkpoint
    from awq_jax.pipeline.load import architecture

    checkpoint = open_checkpoint(path)
    family, config = architecture(checkpoint)
    if not changed.name.startswith(TOKENIZER):
        checkpoint.params(family, config)
        _ = checkpoint.stops, checkpoint.companions
    if changed.suffix not in ("", ".safetensors"):
        read_tokenizer(checkpoint.tokenizer())


def read_tokenizer(tokenizer: Any) -> None:
    from awq_jax.text import decode, encode

    tokens = encode(tokenizer, "Hello, world! <|im_start|> é 日本 12", special=True)
    decode(tokenizer, tokens.tolist())


def read_template(path: Path, changed: Path) -> None:
    from awq_jax.formats import chat
    from awq_jax.formats.checkpoint import open_checkpoint

    chat.subprocess.run = forked
    chat.render(open_checkpoint(path).tokenizer(), [CHAT], add_generation_prompt=True)


def forked(command: list[str], *, input: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """subprocess.run of the process of chat templates, by a fork: one that starts anew imports for two seconds."""
    from awq_jax.formats import chat_process

    streams = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")]
    os.pwrite(streams[0], input.encode(), 0)
    if (child := os.fork()) == 0:
        for k, stream in enumerate(streams):
            os.dup2(stream, k)
        sys.stdin, sys.stdout, sys.stderr = (open(k, mode, closefd=False) for k, mode in enumerate("rww"))  # noqa: SIM115
        try:
            chat_process.main()
        except BaseException as e:
            print(f"{type(e).__name__}: {e}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = [os.pread(stream, 1 << 30, 0).decode() for stream in streams]
    for stream in streams:
        os.close(stream)
    return subprocess.CompletedProcess(command, code, *said[1:])


def read_calibration(path: Path, changed: Path) -> None:
    from checkpoints import tokenizer

    from awq_jax.pipeline.calibration_text import calibration_tokens

    plain = tokenizer()
    plain.chat_template = None  # rendering is the business of the reader "template"
    calibration_tokens(str(changed), plain, samples=4, seq_len=64)


def read_report(path: Path, changed: Path) -> None:
    from awq_jax.commands.inspect import read_errors

    read_errors(path)


def read_params(path: Path, changed: Path) -> None:
    from awq_jax.formats.orbax import load_params, shapes

    shapes(path)
    load_params(path)


def read_tables(path: Path, changed: Path) -> None:
    """What `inspect` prints of the checkpoint in which the damaged file is."""
    from rich.console import Console

    from awq_jax.commands.inspect import inspect

    Console(file=io.StringIO()).print(inspect(path / changed.relative_to(path).parts[0]))


def read_card(path: Path, changed: Path) -> None:
    """The card of what is quantized, with the license of the dense model's."""
    import yaml

    from awq_jax.formats.card import card

    yaml.safe_load(card(path, "awq", "Recipe()", {}, []).split("---\n")[1])


def weights(file: Path) -> bool:
    return not file.name.startswith(TOKENIZER)


def overwrite(path: Path, changed: Path) -> None:
    """Replaces the output whose manifest is damaged, in one step or file by file."""
    from unittest.mock import patch

    from awq_jax.errors import InputError
    from awq_jax.formats import written

    before, where = state(path), changed.parent
    ours = (
        {f"ours/{file}" for file in ("config.json", "params/0", "model", MANIFEST)} if where.name == "ours" else {*""}
    )
    at_once = changed.is_file() and changed.stat().st_size % 2
    with patch.object(written, "exchange", written.exchange if at_once else lambda a, b: False):
        try:
            with written.written_whole(where, overwrite=True) as new:
                fill(new, "new")
        except (OSError, ValueError) as e:
            assert state(path) == before, "a refusal changes nothing"
            raise InputError(str(e)) from e
    after = state(path)
    assert all(after.get(file) == before[file] for file in before.keys() - ours), "a file of somebody else"
    assert after[str(where.relative_to(path) / "model")] == b"new: model"


def put_back(path: Path, changed: Path) -> None:
    """The next run beside what a killed one left."""
    from awq_jax.formats.scratch import scratch_folder

    home = path / changed.relative_to(path).parts[0]
    before = state(path)
    with scratch_folder(home):
        pass
    after = state(path)
    inside = {file for file in before if Path(file).is_relative_to(home.name)}
    assert all(after.get(file) == before[file] for file in before.keys() - inside), "another folder"
    mine = {file for file in inside if before[file].startswith(b"mine")}
    assert all(after.get(file) == before[file] for file in mine), "a file of somebody else"
    old, new = (
        {text for text in before.values() if text.startswith(what)} <= {*after.values()} for what in (b"old", b"new")
    )
    assert old or new, "neither output is whole"


def state(folder: Path) -> dict[str, bytes]:
    """What is in each file, where each link leads, and what else there is."""
    found = {}
    for file in folder.rglob("*"):
        name = str(file.relative_to(folder))
        if file.is_symlink():
            found[name] = os.fsencode(os.readlink(file))
        elif file.is_file():
            found[name] = file.read_bytes()
        elif not file.is_dir():
            found[name] = b"something else"
    return found


READERS = {
    "folder": Reader(tiny, read_model),
    "shards": Reader(lambda folder: tiny(folder, shards=2), read_model),
    "awq": Reader(lambda folder: quantized(folder, "awq"), read_model),
    "orbax": Reader(lambda folder: quantized(folder, "orbax"), read_model),
    "gguf": Reader(gguf, read_model),
    "inspect": Reader(all_kinds, read_tables),
    "params": Reader(params, read_params),
    "tokenizer": Reader(old_tokenizer, read_model, lambda file: file.name.startswith(TOKENIZER)),
    "template": Reader(tiny, read_template, lambda file: file.name.startswith(("chat", "tokenizer_config"))),
    "calibration": Reader(calibration, read_calibration),
    "report": Reader(report, read_report),
    "card": Reader(model_card, read_card),
    "manifest": Reader(outputs, overwrite, lambda file: file.name == MANIFEST, writes=True),
    "moves": Reader(cut_short, put_back, writes=True),
    "large-folder": Reader(lambda folder: tiny(folder, vocab_size=MANY), read_model, weights),
    "large-awq": Reader(lambda folder: quantized(folder, "awq", vocab_size=MANY), read_model, weights),
    "large-orbax": Reader(lambda folder: quantized(folder, "orbax", vocab_size=MANY), read_model, weights),
    "large-gguf": Reader(large_gguf, read_model),
    "large-texts": Reader(large_texts, read_calibration),
}
"""Name -> what makes the files, and what reads them."""

"""What benchmarks/fuzz.py damages and reads: small models in every format, calibration texts, a report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

CHAT = [{"role": "user", "content": "hi"}]


def tiny(folder: Path, **changes: Any) -> Path:
    from checkpoints import tiny_folder

    return tiny_folder(folder / "model", intermediate_size=64, num_hidden_layers=1, **changes)


def quantized(folder: Path, format: Any) -> Path:
    from dataclasses import replace

    from awq_jax import PRESETS, quantize_checkpoint

    recipe = replace(PRESETS["rtn"], group_size=32)
    quantize_checkpoint(tiny(folder), folder / format, recipe, format=format, samples=1, seq_len=64)
    return folder / format


def gguf(folder: Path) -> Path:
    from checkpoints import tiny_gguf

    return tiny_gguf(folder / "model.gguf")


def calibration(folder: Path) -> Path:
    text = "Some words of a text that is long enough. " * 40
    rows = [{"messages": [{"role": "system", "content": "Be kind."}, *CHAT]}, {"text": text}]
    rows += [{"conversations": [{"from": "human", "value": "hi"}]}, {"instruction": "a", "input": "b", "output": text}]
    rows += [{"messages": CHAT, "tools": [{"name": "clock"}]}, {"prompt": [*CHAT], "completion": "yes"}]
    (folder / "texts").mkdir()
    (folder / "texts" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "texts" / "a.json").write_text(json.dumps({"rows": rows}))
    (folder / "texts" / "a.csv").write_text(f"prompt,response\nhi,{text}\n")
    (folder / "texts" / "a.txt").write_text(text)
    return folder / "texts"


def report(folder: Path) -> Path:
    from awq_jax.convert import REPORT
    from awq_jax.quantize import SiteReport
    from awq_jax.spec import QuantSpec

    names = ("layers_0/attn/q/kernel", "layers_0/mlp/up/kernel")
    sites = [asdict(SiteReport(name, QuantSpec(4, 32), 0.01, 0.02)) for name in names]
    (folder / "report").mkdir()
    (folder / "report" / REPORT).write_text(json.dumps(sites))
    return folder / "report"


def read_model(path: Path, changed: Path) -> None:
    """What `load` and `quantize` read of a model; of one whose tokenizer alone is damaged, the tokenizer alone."""
    from awq_jax.formats.checkpoint import open_checkpoint
    from awq_jax.load import architecture

    checkpoint = open_checkpoint(path)
    module, config = architecture(checkpoint)
    if not changed.name.startswith(("tokenizer", "chat")):
        checkpoint.params(module, config)
        _ = checkpoint.stops, checkpoint.companions
    if changed.suffix not in ("", ".safetensors"):
        read_tokenizer(checkpoint.tokenizer())


def read_tokenizer(tokenizer: Any) -> None:
    from awq_jax.formats.text import decode, encode

    tokens = encode(tokenizer, "Hello, world! <|im_start|> é 日本 12", special=True)
    decode(tokenizer, tokens.tolist())


def read_template(path: Path, changed: Path) -> None:
    from awq_jax.formats.chat import render
    from awq_jax.formats.checkpoint import open_checkpoint

    render(open_checkpoint(path).tokenizer(), [CHAT], add_generation_prompt=True)


def read_calibration(path: Path, changed: Path) -> None:
    from checkpoints import tokenizer

    from awq_jax.calib import calibration_tokens

    plain = tokenizer()
    plain.chat_template = None  # rendering is the business of the reader "template"
    calibration_tokens(str(changed), plain, samples=4, seq_len=64)


def read_report(path: Path, changed: Path) -> None:
    from awq_jax.inspect import read_errors

    read_errors(path)


Reader = tuple[Callable[[Path], Path], Callable[[Path, Path], None]]
READERS: dict[str, Reader] = {
    "folder": (tiny, read_model),
    "shards": (lambda folder: tiny(folder, shards=2), read_model),
    "awq": (lambda folder: quantized(folder, "awq"), read_model),
    "orbax": (lambda folder: quantized(folder, "orbax"), read_model),
    "gguf": (gguf, read_model),
    "template": (tiny, read_template),
    "calibration": (calibration, read_calibration),
    "report": (report, read_report),
}
"""Name -> what makes the files, and what reads them."""

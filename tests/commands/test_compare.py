"""`awq-jax compare`, from its arguments to the page."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
from checkpoints import config, tensors, tiny_folder
from commands import run

import awq_jax as awq
from awq_jax.formats.checkpoint import Checkpoint
from awq_jax.pipeline import compare as module

PROMPTS = (
    {"name": "one", "prompt": "What is it?", "tags": ["facts"], "contains": "surely not"},
    {"name": "two", "text": "Once upon a time"},
)
FEW = ("--max-new-tokens", "5")
ONCE = (*FEW, "--temperature", "0")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    tiny_folder(root / "base")
    rng = np.random.default_rng(0)
    near, bad = {}, {}
    for name, w in tensors(config()).items():
        if "_proj" in name:
            near[name] = w * (1 + 1e-3 * rng.normal(size=w.shape).astype("f"))
        if "layers.1.mlp" in name:
            step = np.abs(w).max() / 1.5
            bad[name] = np.round(w / step) * step
    tiny_folder(root / "near", weights=near)
    sites = [{"name": "layers_0/mlp/up/kernel", "spec": {"bits": 4}, "error": 0.01, "nearest_error": 0.02, "note": ""}]
    (root / "near" / "quantization_report.json").write_text(json.dumps(sites))
    tiny_folder(root / "bad", weights=near | bad)
    (root / "p.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    return root


def compare(root, *more):
    return run("compare", root / "base", *more, "--prompts", root / "p.jsonl")


def test_the_report_the_store_and_the_gate(root, monkeypatch):
    out = root / "report"
    done = compare(root, root / "near", root / "bad", "-o", out, *FEW, "--gate", "kl=0.05,top1=0.5,checks=0")
    assert (done.code, done.err) == (1, "")
    lines = [line.split(":")[0] for line in done.out.splitlines() if line.startswith(("pass", "FAIL"))]
    assert lines[:4] == [*[f"pass  {root / 'near'}"] * 3, f"FAIL  {root / 'bad'}"]
    blamed = next(line for line in done.out.splitlines() if line.startswith("FAIL"))
    assert "one" in blamed
    assert "two" in blamed
    html = (out / "index.html").read_text()
    assert "layers_0/mlp/up/kernel: 4 bits, error 1.00" in html
    suites = ElementTree.parse(out / "junit.xml").getroot()
    assert [suite.attrib["failures"] == "0" for suite in suites] == [True, False]
    assert len(suites[0]) == 3 + 2 * len(PROMPTS)

    # What is stored is not run again, and what is gone is shown.
    (root / "near").rename(root / "gone")
    monkeypatch.setattr(Checkpoint, "params", lambda *args: pytest.fail("weights were read"))
    again = compare(root, root / "near", root / "bad", *FEW, "--gate", "kl=0.05")
    assert again.out.startswith(f"{root / 'near'} is not there: what the store has of it is shown.\n")
    figures = lambda done: [line.split("│")[1:] for line in done.out.splitlines() if line.startswith("│")]
    assert figures(again) == figures(done)
    (root / "gone").rename(root / "near")
    assert "is not empty: give --overwrite" in compare(root, root / "near", "-o", out).err


def test_a_new_prompt_alone_is_asked(root, monkeypatch, tmp_path):
    kept, asked = tmp_path / "s.sqlite", []
    answer = module.answer
    monkeypatch.setattr(module, "answer", lambda *args: asked.append(args[-1].split(", ")[1]) or answer(*args))
    for n in (1, 2):
        (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, PROMPTS[:n])))
        told = []
        options = {"max_new_tokens": 5, "temperature": 0, "told": told.append}
        found = awq.compare(root / "base", root / "near", tmp_path / "p.jsonl", kept, **options)
        assert [len(side.runs) for side in (found.base, *found.others)] == [n, n]
    assert asked == ["one", "one", "two", "two"]
    assert told == []


def test_a_name_that_the_store_knows_is_told_what_it_was_never_asked(root, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(PROMPTS[0]))
    options = {"max_new_tokens": 5, "temperature": 0}
    old = tiny_folder(tmp_path / "old", weights={"model.norm.weight": np.full(64, 0.9, np.float32)})
    awq.compare(root / "base", old, file, tmp_path / "s.sqlite", **options)
    old.rename(tmp_path / "new")
    file.write_text("\n".join(map(json.dumps, PROMPTS)))
    told = []
    found = awq.compare(root / "base", old, file, tmp_path / "s.sqlite", told=told.append, **options)
    assert told == [
        f"{old} is not there: what the store has of it is shown.",
        f"{old} was never asked 1 of 2 times, and is not there to be asked.",
        f"KL of {old} to {root / 'base'} is not known 1 of 2 times: it takes both.",
    ]
    assert [run.answer is None for run in found.others[0].runs] == [False, True]


def test_what_cannot_be_compared(root, tmp_path):
    copy = tiny_folder(tmp_path / "copy")
    other = tiny_folder(tmp_path / "other", vocab_size=330)
    for arguments, says in (
        ((copy,), "holds the same as"),
        ((other,), "has 320 tokens and the model 330"),
        ((root / "near", "--gate", "kll=1"), "there is no limit 'kll'"),
        ((root / "near", "--max-new-tokens", "0"), "--max-new-tokens 0: give 1 or more"),
        ((root / "near", "--max-new-tokens", "9999"), f"{root / 'base'}, one: --max-new-tokens 9999 after"),
        ((root / "nowhere",), "does not exist"),
        ((), "give a base and one checkpoint or more"),
    ):
        done = compare(root, *arguments, "--store", tmp_path / "s.sqlite")
        assert done.code == 2
        assert says in done.err, done.err

"""Every command, from its arguments to what it prints."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import config, tensors, tiny_folder, tiny_gguf
from commands import run

import awq_jax as awq
from awq_jax.commands.demo import evaluation_text
from awq_jax.pipeline.quantize_checkpoint import Converted
from awq_jax.pipeline.score import score, windows

FAST = ("--group-size", "32", "--samples", "4", "--seq-len", "128", "--preset", "rtn")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def dense(root):
    return tiny_folder(root / "dense")


@pytest.fixture(scope="module")
def small(root, dense):
    """The folder that `awq-jax quantize` wrote, and what it printed."""
    out = root / "small"
    done = run("quantize", dense, out, *FAST)
    assert (done.code, done.err) == (0, "")
    return out, done


@pytest.fixture(scope="module")
def text(root):
    file = root / "text.txt"
    file.write_text(evaluation_text()[:2000], "utf-8")
    return file


def test_help_from_the_shell():
    command = shutil.which("awq-jax", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("awq-jax is not installed beside this Python")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    for name in ("quantize", "eval", "compare", "generate", "inspect", "demo", "tune", "doctor"):
        assert f"• {name}" in done.stdout


@pytest.mark.parametrize("command", ["quantize", "eval", "compare", "generate", "inspect", "demo", "tune"])
def test_every_argument_has_its_help(command):
    done = run(command, "--help")
    assert (done.code, done.err) == (0, "")
    arguments = re.split(r"\n  (?=[A-Z]|--)", done.out)[1:]
    assert len(arguments) >= 1
    for argument in arguments:
        text = re.sub(r"\((default|required)(.|\n)*|--\S+|\{\S+", "", argument)
        assert len(re.findall("[a-z]{2,}", text)) >= 2, argument


def test_quantize_shows_sites_sizes_and_seconds(small):
    out, done = small
    sites = {name: cells for name, cells in done.rows.items() if name.startswith("layers_")}
    assert len(sites) == 10
    errors = [float(error.strip("%")) for _, _, error, _, _ in sites.values()]
    assert errors == sorted(errors, reverse=True)
    assert all(cells[:2] == ["4", "32"] for cells in sites.values())
    report = {site["name"]: site for site in json.loads((out / "quantization_report.json").read_text())}
    assert all(f"{report[name]['error']:.2%}" == cells[2] for name, cells in sites.items())
    assert all(f"{report[name]['nearest_error']:.2%}" == cells[3] for name, cells in sites.items())
    assert "worst 10 of 14 sites" in done.out
    before = 4 * sum(w.size for w in tensors(config()).values())
    after = sum(f.stat().st_size for f in out.iterdir())
    sizes = [f"{n / 1000:.1f} kB" for n in (before / 2, after)]
    assert done.rows[f"{before / 1000:.1f} kB"] == [*sizes, f"{before / 2 / after:.2f}"]
    assert "search" in done.out
    last = done.out.splitlines()[-1]
    assert last == f"Wrote {out}. Try: awq-jax generate {out} 'Why is the sky blue?'"


@pytest.mark.parametrize(("formats", "inside"), [("awq", ""), ("awq,mlx", "awq")])
def test_the_command_that_quantize_suggests_is_one(dense, root, formats, inside):
    out = root / f"a [{formats}]"
    done = run("quantize", dense, out, *FAST, "--skip", "mlp", "--format", formats)
    assert done.code == 0
    _, program, command, *args = shlex.split(done.out.splitlines()[-1].replace(f"Wrote {out}. ", ""))
    assert (program, command) == ("awq-jax", "generate")
    assert args == [str(out / inside), "Why is the sky blue?"]
    assert run(command, *args, "--max-new-tokens", 2).code == 0
    # The title of a table is broken where it is long.
    joined = lambda text: "".join(text.split())
    assert joined(str(out / inside)) in joined(run("inspect", out / inside).out)


def test_quantize_to_orbax_with_more_options(dense, root):
    out = root / "orbax"
    options = ("--format", "orbax", "--bits", "3", "--symmetric", "--feed", "quantized", "--skip", "down", "mlp/up")
    done = run("quantize", dense, out, *FAST, *options)
    assert (done.code, done.err) == (0, "")
    about = json.loads((out / "awq_jax.json").read_text())
    assert set(about["tensors"]) == {
        f"layers_{i}/{site}/kernel" for i in (0, 1) for site in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate")
    }
    assert {json.dumps(t["spec"], sort_keys=True) for t in about["tensors"].values()} == {
        '{"bits": 3, "group_size": 32, "symmetric": true}'
    }
    shown = run("inspect", out)
    assert shown.rows["attn/q"][:3] == ["64 x 64", "3-bit g32", "2"]
    # 3 bits, a step of 16 for 32 of them, and an input scale of 32 for the 64 outputs.
    assert shown.rows["attn/q"][4] == f"{3 + 16 / 32 + 32 / 64:.2f}"
    assert shown.rows["mlp/up"][1:3] == ["float32", "2"]


@pytest.mark.parametrize("preset", ["fast", "llm_awq"])
def test_presets(dense, root, preset):
    out = root / preset
    done = run("quantize", dense, out, *FAST[:-1], preset, "--skip", "mlp", "--overwrite")
    assert (done.code, done.err) == (0, "")
    assert "worst 8 of 8 sites" in done.out
    report = json.loads((out / "quantization_report.json").read_text())
    assert sum(site["error"] for site in report) <= sum(site["nearest_error"] for site in report)


def chats(root):
    file = root / "chats.jsonl"
    turn = {"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is."}]}
    file.write_text((json.dumps(turn) + "\n") * 30)
    return file


def test_calibration_texts_make_a_difference(dense, root, text):
    written = []
    for k, source in enumerate((text, chats(root), "self")):
        out = root / f"calib-{k}"
        done = run("quantize", dense, out, *FAST, "--calib", source)
        assert (done.code, done.err) == (0, "")
        written.append((out / "quantization_report.json").read_bytes())
    assert len(set(written)) == 3


class TestArguments:
    """What `quantize` makes of its flags."""

    @pytest.fixture
    def asked(self, monkeypatch):
        asked = {}

        def fake(model, out, recipe, **options):
            asked.update(model=model, out=out, recipe=recipe, **options)
            return Converted(out, 4, 2, 1, (), {}, recipe, ())

        monkeypatch.setattr("awq_jax.pipeline.quantize_checkpoint.quantize_checkpoint", fake)
        return asked

    def test_defaults(self, asked):
        assert run("quantize", "org/model", "out").code == 0
        del asked["progress"], asked["told"]
        assert asked == {
            "model": "org/model",
            "out": Path("out"),
            "recipe": awq.PRESETS["default"],
            "format": "awq",
            "calib": (),
            "samples": None,
            "seq_len": 512,
            "feed": "dense",
            "average_bits": None,
            "distill": 0,
            "overwrite": False,
        }

    @pytest.mark.parametrize("name", awq.PRESETS)
    def test_every_preset_can_be_named(self, asked, name):
        assert run("quantize", "m", "out", "--preset", name, "--group-size", "64").code == 0
        assert asked["recipe"] == replace(awq.PRESETS[name], group_size=64)

    @pytest.mark.parametrize("name", awq.PRESETS)
    def test_a_preset_is_that_of_python(self, asked, name):
        run("quantize", "m", "out", "--preset", name)
        assert asked["recipe"] == awq.PRESETS[name]

    def test_fast_takes_a_quarter_of_the_samples_unless_told(self, asked):
        run("quantize", "m", "out", "--preset", "fast")
        assert (asked["samples"], asked["recipe"].samples) == (None, 8)
        run("quantize", "m", "out", "--preset", "fast", "--samples", "9")
        assert asked["samples"] == 9
        run("quantize", "m", "out", "--samples", "0")
        assert asked["samples"] == 0

    def test_the_rest(self, asked):
        flags = "--skip a b --symmetric --bits 3 --format orbax --feed quantized --overwrite --calib self text.txt"
        assert run("quantize", "m", "out", *flags.split(), "--seq-len", "9", "--distill", "3").code == 0
        recipe = asked["recipe"]
        assert recipe.rules == (awq.Rule("a", skip=True), awq.Rule("b", skip=True))
        assert (recipe.symmetric, recipe.bits) == (True, 3)
        assert (asked["format"], asked["feed"], asked["overwrite"]) == ("orbax", "quantized", True)
        assert (asked["calib"], asked["seq_len"]) == (("self", "text.txt"), 9)
        assert (asked["average_bits"], asked["distill"]) == (None, 3)
        run("quantize", "m", "out", "--bits", "3.5")
        assert asked["average_bits"] == 3.5


def test_eval_against_the_dense_model(small, dense, text):
    out, _ = small
    numbers = ("--windows", "2", "--length", "128")
    done = run("eval", out, text, "--against", dense, *numbers)
    assert (done.code, done.err) == (0, "")
    models = awq.load(out), awq.load(dense)
    tokens = windows(text.read_text("utf-8"), models[0].tokenizer, 2, 128)
    expected, alone = score(*models[:1], tokens, models[1]), score(models[1], tokens)
    with_error = lambda name, form: f"{getattr(expected, name):{form}} ± {expected.errors[name]:{form}}"
    assert done.rows["perplexity"] == [
        f"{one.perplexity:.2f} ± {one.errors['perplexity']:.2f}" for one in (expected, alone)
    ]
    assert done.rows["KL to dense"] == [with_error("kl", ".4f"), ""]
    assert done.rows["same top-1"] == [with_error("top1", ".1%"), ""]
    assert expected.kl > 0.001
    told, stages = [], []
    options = {"windows": 2, "length": 128, "told": told.append, "progress": lambda *at: stages.append(at)}
    found = awq.evaluate(out, text, dense, **options)
    assert list(found) == [str(out), str(dense)]
    same = lambda name, one: replace(found[name][str(text)], bits_per_byte=None, errors=one.errors, worst=()) == one
    assert same(str(out), expected)
    assert same(str(dense), alone)
    shown = json.loads(run("eval", out, text, "--against", dense, "--json", *numbers).out)
    assert shown["scores"] == json.loads(
        json.dumps({n: {t: asdict(s) for t, s in of.items()} for n, of in found.items()})
    )
    itself = awq.evaluate(dense, text, dense, **options)[str(dense)][str(text)]
    assert (itself.kl, itself.top1, itself.ratio) == (0, 1, 1)
    assert told == []
    assert stages[:2] + stages[-1:] == [("loading", 0, 2), ("window", 0, 2), ("loading", 1, 1)]


def test_eval_of_several_checkpoints_on_several_texts(small, dense, text, root):
    chat = chats(root)
    done = run("eval", small[0], text, chat, "--also", dense, "--length", "64", "--windows", "1")
    assert done.code == 0
    of_text, of_chats = [line.split("│")[2:-1] for line in done.out.splitlines() if "│ tokens" in line]
    assert [cell.strip() for cell in of_text] == ["63", "63"]
    assert len(of_chats) == 2


def test_eval_alone(small, text):
    out, _ = small
    done = run("eval", out, text, "--length", "64", "--windows", "1")
    assert done.code == 0
    (perplexity,) = done.rows["perplexity"]
    assert 2 < float(perplexity) < 10_000
    assert "KL to dense" not in done.rows


def test_generate(small):
    out, _ = small
    model = awq.load(out)
    for flags, options in (
        ((), {}),
        (("--raw",), {"chat": False}),
        (("--temperature", "2", "--top-p", "0.9", "--seed", "3"), {"temperature": 2.0, "top_p": 0.9, "seed": 3}),
    ):
        done = run("generate", out, "hello", "--max-new-tokens", "8", *flags)
        assert (done.code, done.out) == (0, model.generate("hello", max_new_tokens=8, **options) + "\n")
        assert re.match(r"prompt: \d+ tokens, [\d.]+ tokens/s; answer: [1-8] tokens, [\d.]+ tokens/s", done.err)
    assert model.generate("hello", temperature=2.0, seed=1) != model.generate("hello", temperature=2.0, seed=2)


def test_an_answer_is_printed_letter_by_letter(small, monkeypatch):
    answer = ["[bold]no markup[/nor this] :smile: ", *["and no line breaks "] * 20]
    monkeypatch.setattr(awq.Model, "stream", lambda *args, **options: iter(answer))
    assert run("generate", small[0], "hello").out == "".join(answer) + "\n"


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(small, monkeypatch):
    def answer(*args, **options):
        yield "so "
        yield "far"
        raise KeyboardInterrupt

    monkeypatch.setattr(awq.Model, "stream", answer)
    done = run("generate", small[0], "hello")
    assert (done.code, done.out, done.err) == (130, "so far\n", "awq-jax: stopped.\n")


def test_inspect(small, dense, root, monkeypatch):
    monkeypatch.setattr(np, "memmap", lambda *args: pytest.fail("more than headers is read"))
    out, _ = small
    shown = run("inspect", out)
    assert (shown.code, shown.err) == (0, "")
    report = {site["name"]: site["error"] for site in json.loads((out / "quantization_report.json").read_text())}
    up = [report[f"layers_{i}/mlp/up/kernel"] for i in (0, 1)]
    # 64 x 128 codes of half a byte; a step of two bytes and a zero point of half a byte for each 32 of them.
    kept = 1 / 2 + 2.5 / 32
    expected = ["64 x 128", "4-bit g32", "2", f"{2 * 64 * 128 * kept / 1000:.1f} kB", f"{8 * kept:.2f}"]
    assert shown.rows["mlp/up"] == [*expected, f"{sum(up) / 2:.2%}", f"{max(up):.2%}"]
    assert shown.rows["embed"] == ["320 x 64", "float16", "1", "41.0 kB", "16.00", "", ""]
    assert len(shown.rows) == 12
    assert max(map(len, shown.out.splitlines())) <= 80
    plain = run("inspect", dense)
    assert plain.rows["mlp/up"] == ["64 x 128", "float32", "2", "65.5 kB", "32.00"]
    assert "32.00 bits a weight  0.50 times smaller" in plain.out
    assert run("inspect", tiny_gguf(root / "m.gguf")).rows["mlp/up"][:3] == ["256 x 512", "Q8_0", "2"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "quantize, convert, eval, compare, generate, inspect, demo"),
        (("quantise",), "there is no command quantise (did you mean quantize?)"),
        (("quantize", "model", "out", "--groupsize", "64"), "Perhaps you meant: --group-size"),
        (("quantize", "model"), "OUT"),
        (("quantize", "model", "out", "--bits", "four"), "--bits"),
        (
            ("quantize", "model", "out", "--preset", "fst"),
            "none of default, fast, rtn, llm_awq, autoawq, llmcompressor (did you mean fast?)",
        ),
        (
            ("quantize", "model", "out", "--format", "awg"),
            "--format: 'awg' is none of awq, compressed-tensors, gptq, gptq_v2, mlx, orbax (did you mean awq?)",
        ),
        (("quantize", "model", "out", "--wat"), "--wat"),
        (
            ("quantize", "model", "out", "--calib"),
            "--calib: give one or more, none of them empty, or leave the flag out",
        ),
        (("quantize", "model", "out", "--skip", ""), "--skip: give one or more"),
        (("eval", "model", "text", "--also"), "--also: give one or more"),
    ],
)
def test_arguments_that_do_not_parse(args, says):
    done = run(*args)
    assert (done.code, done.out) == (2, "")
    assert says in " ".join(done.err.replace("│", " ").split())


def test_version():
    done = run("--version")
    assert (done.code, done.out, done.err) == (0, f"awq-jax {awq.__version__}\n", "")


def test_the_group_size_is_chosen_and_what_was_read_is_told(dense, root):
    done = run("quantize", dense, root / "chosen", *FAST[2:], "--calib", chats(root))
    first, second, *_ = done.out.splitlines()
    assert first == "Groups of 64: the largest of 128, 64, 32 that divides 64, 128."
    assert re.fullmatch(rf"{root}/chats.jsonl: 30 chats, [\d,]+ tokens, 512 used", second)
    assert json.loads((root / "chosen" / "config.json").read_text())["quantization_config"]["group_size"] == 64


def test_windows_that_a_text_does_not_fill_are_told(small, text, root):
    done = run("eval", small[0], text, "--length", "256", "--windows", "9")
    assert re.match(rf"{text} fills \d of 9 windows", done.out)
    said = root / "said.jsonl"
    said.write_text(json.dumps({"text": text.read_text()}))
    assert run("eval", small[0], said, "--length", "256").rows["perplexity"] == done.rows["perplexity"]


def test_convert_and_what_it_would_run_on(small, root):
    out, _ = small
    done = run("convert", out, root / "converted", "--to", "compressed-tensors,mlx")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        "compressed-tensors: 14 quantized weights, all to the bit.",
        "mlx: 14 quantized weights, all to the bit.",
        f"Wrote {root / 'converted'}.",
    ]
    shown = run("inspect", root / "converted" / "compressed-tensors", "--target", "vllm-tpu")
    assert "refused: not 4 bits," in " ".join(shown.out.split())
    for options, says in (
        (("--to", "gptq"), "--symmetric if its zero points .* --requantize to round it anew"),
        (("--to", "mlx", "--bits", "8"), "not 8 in 32: give --requantize"),
    ):
        done = run("convert", out, root / "no", *options)
        assert (done.code, done.out) == (2, "")
        assert re.search(says, done.err)


def test_a_target_stands_for_format_and_symmetry(dense, root):
    done = run("quantize", dense, root / "tpu", *FAST, "--target", "vllm-tpu")
    assert done.out.startswith("For vllm-tpu: format compressed-tensors, 4 bits, symmetric. vLLM on TPUs reads")
    groups = json.loads((root / "tpu" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert {
        (g["weights"]["num_bits"], g["weights"]["group_size"], g["weights"]["symmetric"]) for g in groups.values()
    } == {(4, 32, True)}

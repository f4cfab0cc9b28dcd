"""Calibration text: what is read, and the windows that are cut from it."""

import copy
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import tokenizer
from hypothesis import given
from hypothesis import strategies as st

from awq_jax.errors import InputError
from awq_jax.pipeline import calibration_text as calib
from awq_jax.pipeline.calibration_text import Read, calibration_tokens, packaged_text

CHAT = {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A model."}]}
CHAT_TEXT = "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\nA model.<|im_end|>\n"


class Letters:
    """A tokenizer with one token a character, so that windows tell where in the text they come from."""

    chat_template = None

    def __call__(self, text, **options):
        assert options["add_special_tokens"] is False
        self.input_ids = list(map(ord, text))
        return self


def numbered(count):
    """A text whose character k is k, between characters that JSON or lines would treat in a way of their own."""
    return "".join(chr(0x4E00 + k) for k in range(count))


def cut(file, text, samples, seq_len):
    file.write_text(text, "utf-8")
    tokens = calibration_tokens(str(file), Letters(), samples=samples, seq_len=seq_len)
    assert tokens.dtype == np.int32
    return tokens - 0x4E00


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("text") / "text.txt"


@given(count=st.integers(256, 5000), samples=st.integers(1, 40), seq_len=st.integers(1, 600))
def test_windows_of_any_text_are_equally_long_and_cover_it_evenly(file, count, samples, seq_len):
    found = cut(file, numbered(count), samples, seq_len)
    n, length = found.shape
    assert 1 <= n <= samples
    assert 1 <= length <= seq_len
    starts = found[:, 0]
    np.testing.assert_array_equal(found, starts[:, None] + np.arange(length))
    assert starts[0] == 0
    if n == 1:
        return
    assert np.ptp(np.diff(starts)) <= 1
    furthest = 10 * seq_len if count > 20 * samples * seq_len else length
    assert starts[-1] == count - furthest


@given(count=st.integers(256, 2000), samples=st.integers(1, 40), seq_len=st.integers(32, 600))
def test_of_a_short_text_at_most_half_a_window_is_left_out(file, count, samples, seq_len):
    found = cut(file, numbered(count), samples, seq_len)
    if len(found) < samples:
        assert found.size >= count - seq_len / 2 - len(found)
    else:
        assert found.shape == (samples, min(seq_len, count // samples))


def test_the_same_text_gives_the_same_windows():
    found = [calibration_tokens(None, tokenizer(), samples=3, seq_len=64) for _ in range(2)]
    assert found[0].shape == (3, 64)
    np.testing.assert_array_equal(*found)


def test_without_a_source_the_packaged_text_is_cut():
    found = calibration_tokens(None, tokenizer(), samples=4, seq_len=32)
    text = packaged_text()
    starts = np.linspace(0, len(text) - 320, 4).astype(int)
    for row, start in zip(found, starts, strict=True):
        decoded = tokenizer().decode(row)
        # A window may begin or end inside of a letter of several bytes.
        assert decoded.strip("�") in text[start : start + 320]


def jsonl(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(file)


def decoded(source, **options):
    tokens = calibration_tokens(source, tokenizer(), **({"samples": 1, "seq_len": 10**4} | options))
    return "".join(tokenizer().decode(row) for row in tokens)


def test_short_samples_are_set_end_to_end(tmp_path):
    rows = [{"text": f"sample {k}."} for k in range(200)]
    assert decoded(jsonl(tmp_path, *rows)) == "\n".join(row["text"] for row in rows)


@pytest.mark.parametrize("chat", [CHAT, CHAT["messages"], {"conversations": CHAT["messages"]}])
def test_chats_go_through_the_chat_template(tmp_path, chat):
    found = decoded(jsonl(tmp_path, *[chat] * 20))
    assert found == "\n".join([CHAT_TEXT] * 20)
    ids = calibration_tokens(jsonl(tmp_path, *[chat] * 20), tokenizer(), samples=1, seq_len=10**4)
    assert (ids == tokenizer().convert_tokens_to_ids("<|im_start|>")).sum() == 40


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0b", "\r"])
def test_letters_that_end_a_line_elsewhere_do_not_end_a_row(tmp_path, separator):
    text = f"one{separator}two " * 100
    assert decoded(jsonl(tmp_path, {"text": text}, text)) == f"{text}\n{text}"


def test_blank_lines_are_passed_over(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('\n{"text": "%s"}\r\n  \n' % ("a word " * 100), "utf-8")
    assert decoded(str(file)) == "a word " * 100


def test_other_files_are_text_as_they_are(tmp_path):
    file = tmp_path / "text.md"
    file.write_text("# Title\n" * 60, "utf-8")
    assert decoded(str(file)) == "# Title\n" * 60


def test_a_text_longer_than_the_models_context_is_cut_in_silence(tmp_path, caplog, capfd):
    short = copy.deepcopy(tokenizer())
    short.model_max_length = 64
    (tmp_path / "a.txt").write_text("a word " * 500)
    assert calibration_tokens(str(tmp_path / "a.txt"), short, samples=2, seq_len=64).shape == (2, 64)
    assert (caplog.text, *capfd.readouterr()) == ("", "", "")


def test_the_model_writes_its_own(tmp_path):
    own = lambda n, length: np.zeros((n, length), np.int32)
    assert calibration_tokens("self", tokenizer(), samples=2, seq_len=5, own=own).shape == (2, 5)
    with pytest.raises(InputError, match="load the model first"):
        calibration_tokens("self", tokenizer(), samples=2, seq_len=5)


def test_a_dataset_of_the_hub(monkeypatch):
    asked, rows = {}, [{"text": f"row {k} of a long data set, "} for k in range(1000)]
    taken = []

    def load_dataset(name, **options):
        asked.update({"name": name} | options)
        for row in rows:
            taken.append(row)
            yield row

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = calibration_tokens("someone/texts", tokenizer(), samples=8, seq_len=40)
    assert found.shape == (8, 40)
    assert asked == {"name": "someone/texts", "split": "train", "streaming": True}
    assert len(taken) <= 65

    def refuse(name, **options):
        raise RuntimeError("no such data set\nat all")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=refuse))
    with pytest.raises(
        InputError, match=r"someone/texts is no file, and the hub gives .*\(no such data set at all\): check the name"
    ):
        calibration_tokens("someone/texts", tokenizer(), samples=8, seq_len=40)


def test_a_dataset_needs_the_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'awq-jax\[datasets\]'"):
        calibration_tokens("someone/texts", tokenizer(), samples=8, seq_len=40)


def test_rows_that_cannot_be_read_are_named(tmp_path):
    good = {"text": "fine"}
    for bad, says in (
        ({"prompt": "x"}, r"found the fields \['prompt'\]"),
        ({"text": ["x"]}, r"found the fields \['text'\]"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "neither a text nor a list of parts"),
        ({"messages": [{"role": "user", "text": "a"}]}, "a message of user has no content"),
        (7, "found 7"),
        ({"text": None}, r"found the fields \['text'\], with nothing in text"),
        ({"messages": 7}, "7 is neither a text nor a list of messages"),
    ):
        with pytest.raises(InputError, match=rf"rows\.jsonl, line 2: expected .*messages.*{says}"):
            decoded(jsonl(tmp_path, good, bad))


def test_why_there_are_too_few_tokens_is_told(tmp_path):
    row = {"messages": CHAT["messages"], "images": ["x.png"]}
    with pytest.raises(InputError, match=r"rows.jsonl \(2 rows with an image left out\) gives 0 tokens"):
        decoded(jsonl(tmp_path, row, row), samples=1, seq_len=8)


def test_a_chat_that_the_template_refuses_is_named(tmp_path):
    strict = copy.deepcopy(tokenizer())
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"line 1: .*roles must alternate"):
        calibration_tokens(jsonl(tmp_path, CHAT), strict, samples=1, seq_len=8)


@pytest.mark.model
def test_the_packaged_text_fills_the_default_for_smollm2(smollm2):
    from awq_jax.formats.checkpoint import open_checkpoint

    smol = open_checkpoint(smollm2).tokenizer()
    assert calibration_tokens(None, smol, samples=32, seq_len=512).shape == (32, 512)
    assert len(smol(packaged_text(), verbose=False).input_ids) > 2 * 32 * 512


def test_several_sources_share_the_samples(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("a" * 5000)
    second.write_text("b" * 5000)
    own = lambda samples, seq_len: np.full((samples, seq_len), ord("c"), np.int32)
    sources = (str(first), "self", str(second))
    found = calibration_tokens(sources, Letters(), samples=8, seq_len=300, own=own)
    assert found.shape == (8, 300)
    assert "".join(chr(row[0]) for row in found) == "aaacccbb"
    assert (found == found[:, :1]).all()


def test_the_shortest_source_sets_the_length(tmp_path):
    short = tmp_path / "a.txt"
    short.write_text("a" * 300)
    own = lambda samples, seq_len: np.zeros((samples, seq_len), np.int32)
    assert calibration_tokens((str(short), "self"), Letters(), samples=2, seq_len=400, own=own).shape == (2, 300)


def test_any_number_of_samples_is_shared_at_once(monkeypatch):
    asked = []
    found = np.zeros((1, 1), int), Read("", 0, 0, 0, 0)
    monkeypatch.setattr(calib, "_of_source", lambda source, tokenizer, n, *rest: asked.append(n) or found)
    calibration_tokens(["a", "b", "c"], None, samples=10**15 + 1, seq_len=1)
    assert (sum(asked), max(asked) - min(asked)) == (10**15 + 1, 1)


def test_more_sources_than_samples_are_refused():
    with pytest.raises(InputError, match="a sample a source"):
        calibration_tokens(("self", "self"), Letters(), samples=1, seq_len=8)


def test_a_source_named_twice_is_read_once_for_two_shares(tmp_path):
    asked, told = [], []

    def own(samples, seq_len):
        asked.append(samples)
        return np.arange(samples * seq_len, dtype=np.int32).reshape(samples, seq_len)

    (tmp_path / "a.txt").write_text(numbered(2000), "utf-8")
    sources = ["self", str(tmp_path / "a.txt"), "self", str(tmp_path / "a.txt")]
    found = calibration_tokens(sources, Letters(), samples=7, seq_len=60, own=own, told=told.append)
    assert asked == [4]
    assert found.shape == (7, 60)
    assert len(np.unique(found, axis=0)) == 7
    assert [read.used for read in told] == [240, 180]


@pytest.mark.parametrize(("samples", "seq_len", "few"), [(1, 1, True), (2, 127, True), (2, 128, False)])
def test_that_few_tokens_are_used_is_told(samples, seq_len, few):
    own = lambda samples, seq_len: np.zeros((samples, seq_len), np.int32)
    for sources in (None, "self", [None, "self"][:samples]):
        told = []
        calibration_tokens(sources, tokenizer(), samples=samples, seq_len=seq_len, own=own, told=told.append)
        assert [" used in all are few" in str(read) for read in told] == [False] * (len(told) - 1) + [few]


def test_what_was_read_is_told(tmp_path):
    told = []
    rows = [{"text": f"sample {k}."} for k in range(90)]
    sources = (jsonl(tmp_path, *rows), jsonl_of_chats(tmp_path), "self")
    own = lambda samples, seq_len: np.zeros((samples, seq_len), np.int32)
    options = {"samples": 6, "seq_len": 50, "own": own, "told": told.append}
    calibration_tokens(sources, tokenizer(), **options)
    count = lambda text: len(tokenizer()(text).input_ids)
    tokens = [count("\n".join(row["text"] for row in rows)), count("\n".join([CHAT_TEXT] * 20))]
    assert list(map(str, told)) == [
        f"{sources[0]}: 90 texts, {tokens[0]:,} tokens, 100 used",
        f"{sources[1]}: 20 chats, {tokens[1]:,} tokens, 100 used",
        "what the model writes: 2 texts, 100 tokens, 100 used",
    ]


def test_of_a_long_text_the_tokens_are_estimated(tmp_path):
    told = []
    (tmp_path / "a.txt").write_text("a word " * 20_000)
    calibration_tokens(str(tmp_path / "a.txt"), tokenizer(), samples=2, seq_len=64, told=told.append)
    assert "1 text, about " in str(told[0])
    assert told[0].tokens == pytest.approx(len(tokenizer()("a word " * 20_000).input_ids), rel=0.05)


def jsonl_of_chats(tmp_path):
    file = tmp_path / "chats.JSONL"
    file.write_text("\n".join([json.dumps(CHAT)] * 20), "utf-8-sig")
    return str(file)

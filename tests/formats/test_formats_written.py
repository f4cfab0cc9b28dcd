"""Folders that appear whole or not at all, and that replace none but their like."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from awq_jax.errors import InputError
from awq_jax.formats import manifest, moves, scratch, written
from awq_jax.formats.scratch import scratch_folder
from awq_jax.formats.written import MANIFEST, check_destination, written_whole


def fill(out: Path, error: BaseException | None = None, meanwhile: Path | None = None, **options) -> None:
    """Write a file in a block; then someone may fill `meanwhile`, or an error may end the block."""
    with written_whole(out, **options) as scratch:
        (scratch / "a").write_text("1")
        if meanwhile is not None:
            meanwhile.parent.mkdir(exist_ok=True)
            meanwhile.write_text("2")
        if error is not None:
            raise error


def earlier(out: Path) -> Path:
    """An output that was written before."""
    with written_whole(out) as scratch:
        (scratch / "part").mkdir()
        (scratch / "part" / "old").write_text("0")
        (scratch / "config.json").write_text("{}")
    return out


def contents(folder: Path) -> dict[str, str]:
    """The files and what is in them, without the manifests."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST]
    return {str(p.relative_to(folder)): p.read_text() for p in files}


NEW, OLD = {"out/a": "1"}, {"out/part/old": "0", "out/config.json": "{}"}


def test_the_folder_appears_when_the_block_ends_and_nothing_else_stays(tmp_path):
    out = tmp_path / "models" / "out"
    with written_whole(out) as scratch:
        (scratch / "a").write_text("1")
        assert not out.parent.exists()
    assert contents(tmp_path) == {"models/out/a": "1"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["models"]


def test_the_manifest_lists_the_files(tmp_path):
    out = earlier(tmp_path / "out")
    assert list(json.loads((out / MANIFEST).read_text())["files"]) == ["config.json", "part/old"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [False, True])
def test_an_error_in_the_block_leaves_what_was_there(tmp_path, error, before):
    out = tmp_path / "new" / "out"
    if before:
        earlier(out)
    there = contents(tmp_path)
    with pytest.raises(type(error)):
        fill(out, error, overwrite=True)
    assert contents(tmp_path) == there
    assert list(tmp_path.iterdir()) == ([out.parent] if before else [])


def test_the_folders_change_places_at_once(tmp_path, monkeypatch):
    out = earlier(tmp_path / "out")
    (tmp_path / "other").mkdir()
    if not written.exchange(out, tmp_path / "other"):
        pytest.skip("no renameat2 here")
    assert written.exchange(out, tmp_path / "other")
    (tmp_path / "other").rmdir()
    monkeypatch.setattr(written, "move_in", lambda *args: pytest.fail("moved file by file"))
    fill(out, overwrite=True)
    assert contents(tmp_path) == NEW


class TestWithoutExchange:
    """Where the system cannot exchange folders files are moved one by one, and back if anything fails."""

    @pytest.fixture(autouse=True)
    def without(self, monkeypatch):
        monkeypatch.setattr(written, "exchange", lambda a, b: False)

    @pytest.fixture
    def out(self, tmp_path):
        return earlier(tmp_path / "out")

    def test_the_folder_is_replaced(self, tmp_path, out):
        fill(out, overwrite=True)
        assert contents(tmp_path) == NEW
        assert sorted(p.name for p in out.iterdir()) == ["a", MANIFEST]
        fill(out, overwrite=True)

    @pytest.mark.parametrize("at", range(5))
    def test_a_failure_at_any_move_brings_the_old_files_back(self, tmp_path, out, monkeypatch, at):
        with monkeypatch.context() as patch:
            fail_at(patch, at, OSError(errno.ENOSPC, "No space left on device"))
            with pytest.raises(OSError, match="No space left"):
                fill(out, overwrite=True)
        assert contents(tmp_path) == OLD
        assert list(tmp_path.iterdir()) == [out]
        fill(out, overwrite=True)

    @pytest.mark.parametrize("at", range(5))
    def test_the_next_run_brings_them_back_after_a_kill(self, tmp_path, out, monkeypatch, at):
        with monkeypatch.context() as patch:
            fail_at(patch, at, KeyboardInterrupt())
            patch.setattr(moves, "take_back", lambda folder: None)
            patch.setattr(scratch, "discard", lambda folder: None)
            with pytest.raises(KeyboardInterrupt):
                fill(out, overwrite=True)
        assert len(list(tmp_path.iterdir())) == 2
        assert at == 0 or not (out / MANIFEST).exists()
        with pytest.raises(FileExistsError, match="overwrite=True"):
            fill(out)
        assert contents(tmp_path) == OLD
        assert list(tmp_path.iterdir()) == [out]

    def test_what_comes_while_files_are_moved_is_not_replaced(self, tmp_path, out, monkeypatch):
        real = Path.rename

        def rename(self, target):
            if self.name == "part":
                (self / "theirs").write_text("2")
            return real(self, target)

        monkeypatch.setattr(Path, "rename", rename)
        with pytest.raises(FileExistsError, match="holds part/theirs, which awq_jax did not write"):
            fill(out, overwrite=True)
        assert contents(tmp_path) == OLD | {"out/part/theirs": "2"}


class TestCutShort:
    """What a run that was killed between its moves leaves is put back by the next one, and nothing else is touched."""

    @pytest.fixture
    def left(self, tmp_path, monkeypatch):
        """The scratch folder of a run that died when only its manifest was yet to be moved."""
        out = earlier(tmp_path / "out")
        with monkeypatch.context() as patch:
            patch.setattr(written, "exchange", lambda a, b: False)
            patch.setattr(moves, "take_back", lambda folder: None)
            patch.setattr(scratch, "discard", lambda folder: None)
            fail_at(patch, 4, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                fill(out, overwrite=True)
        (left,) = tmp_path.glob(scratch.NAMES)
        assert sorted(contents(out)) == ["a"]
        return left

    def next_run(self, home):
        with scratch_folder(home):
            pass

    def test_all_is_well(self, tmp_path, left):
        self.next_run(tmp_path)
        assert contents(tmp_path) == OLD
        assert not left.exists()

    def test_files_that_came_since_stay(self, tmp_path, left):
        (tmp_path / "out" / "a").write_text("mine")
        (tmp_path / "out" / "mine").write_text("mine")
        self.next_run(tmp_path)
        assert contents(tmp_path) == OLD | {"out/a": "mine", "out/mine": "mine"}

    def test_a_place_that_is_taken_keeps_what_it_has_and_the_old_file_is_named(self, tmp_path, left, caplog):
        (tmp_path / "out" / "part").mkdir()
        (tmp_path / "out" / "part" / "old").write_text("mine")
        for _ in range(2):
            self.next_run(tmp_path)
        assert contents(tmp_path / "out") == {"part/old": "mine", "config.json": "{}"}
        assert (left / "old" / "out" / "part" / "old").read_text() == "0"
        (line,) = caplog.messages
        assert f"{left} holds files of an earlier output that cannot be put back: move them by hand" in line

    @pytest.mark.parametrize("text", [None, "", "[]", '{"files": {"a": "1"}}', '{"files": {"../../../mine": ""}}'])
    def test_a_list_that_is_damaged_costs_no_file(self, tmp_path, left, text):
        (tmp_path / "mine").write_text("mine")
        listed = left / "new" / "out" / MANIFEST
        if text is None:
            listed.rename(listed.with_name("elsewhere"))
        else:
            listed.write_text(text)
        self.next_run(tmp_path)
        found = contents(tmp_path)
        assert (found["mine"], found["out/a"]) == ("mine", "1")
        assert {Path(file).name: text for file, text in found.items() if text == "0"} == {"old": "0"}

    def test_links_lead_nowhere(self, tmp_path, left):
        elsewhere = tmp_path / "elsewhere"
        (tmp_path / "out").rename(elsewhere)
        (tmp_path / "out").symlink_to(elsewhere)
        (elsewhere / "mine").write_text("mine")
        self.next_run(tmp_path)
        assert contents(elsewhere) == {"a": "1", "mine": "mine"}
        assert contents(left / "old" / "out") == {"part/old": "0", "config.json": "{}"}


def fail_at(patch, at, error):
    """Raise `error` in the place of renaming number `at`."""
    real, calls = Path.rename, []

    def rename(self, target):
        calls.append(1)
        if len(calls) == at + 1:
            raise error
        return real(self, target)

    patch.setattr(Path, "rename", rename)


class TestForeignFiles:
    """What this project did not write is never deleted."""

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_folder_without_a_manifest_is_refused_before_the_block_runs(self, tmp_path, overwrite):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("0")
        with pytest.raises(FileExistsError, match=f"holds mine, which no {MANIFEST} lists.*: move it away"):
            fill(tmp_path / "out", overwrite=overwrite)
        assert contents(tmp_path) == {"out/mine": "0"}

    @pytest.mark.parametrize("name", ["mine", "part/mine", ".hidden", "link", "folder link"])
    def test_a_foreign_file_is_named(self, tmp_path, name):
        out = earlier(tmp_path / "out")
        if "link" in name:
            (out / name).symlink_to(tmp_path if "folder" in name else out / "config.json")
        else:
            (out / name).write_text("2")
        with pytest.raises(FileExistsError, match=f"holds {name}, which awq_jax did not write: move it"):
            fill(out, overwrite=True)
        assert OLD.items() <= contents(tmp_path).items()

    @pytest.mark.parametrize("name", ["config.json", "part/old"])
    def test_a_file_that_is_not_as_it_was_is_named(self, tmp_path, name):
        out = earlier(tmp_path / "out")
        (out / name).write_text("mine")
        with pytest.raises(FileExistsError, match=f"holds {name}, which is not as awq_jax wrote it: move it away"):
            fill(out, overwrite=True)
        assert contents(out)[name] == "mine"

    def test_the_last_byte_of_a_large_file_counts(self, tmp_path):
        with written_whole(tmp_path / "out") as scratch:
            (scratch / "weights").write_bytes(bytes(3 << 20))
        with (tmp_path / "out" / "weights").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"1")
        with pytest.raises(FileExistsError, match="holds weights, which is not as awq_jax wrote it"):
            fill(tmp_path / "out", overwrite=True)

    def test_a_link_in_the_place_of_a_file_is_named(self, tmp_path):
        out = earlier(tmp_path / "out")
        (out / "config.json").rename(tmp_path / "mine")
        (out / "config.json").symlink_to(tmp_path / "mine")
        with pytest.raises(FileExistsError, match=r"holds config\.json, which is not as awq_jax wrote it"):
            fill(out, overwrite=True)

    def test_a_copy_is_as_it_was(self, tmp_path):
        shutil.copytree(earlier(tmp_path / "first"), tmp_path / "out")
        shutil.rmtree(tmp_path / "first")
        fill(tmp_path / "out", overwrite=True)
        assert contents(tmp_path) == NEW

    def test_a_scratch_folder_that_another_run_uses_is_named(self, tmp_path):
        out = earlier(tmp_path / "out")
        with scratch_folder(out) as theirs:
            (theirs / "file").write_text("half")
            with pytest.raises(FileExistsError, match=f"holds {theirs.name} of another run .* remove {theirs}/.*lock"):
                fill(out, overwrite=True)
        fill(out, overwrite=True)
        assert contents(tmp_path) == NEW

    def test_an_output_of_ours_is_replaced_when_asked(self, tmp_path):
        out = earlier(tmp_path / "out")
        with pytest.raises(FileExistsError, match="is not empty: give overwrite=True"):
            fill(out)
        with written_whole(out, overwrite=True) as scratch:
            (scratch / "a").write_text("1")
            assert contents(out) == {"part/old": "0", "config.json": "{}"}
        assert contents(tmp_path) == NEW

    def test_a_manifest_reaches_nothing_outside(self, tmp_path, monkeypatch):
        monkeypatch.setattr(written, "exchange", lambda a, b: False)
        out = earlier(tmp_path / "out")
        (tmp_path / "mine").write_text("0")
        listed = json.loads((out / MANIFEST).read_text())["files"]
        more = dict.fromkeys(["../mine", "/", "..", str(tmp_path / "mine")], manifest.mark(tmp_path / "mine"))
        (out / MANIFEST).write_text(json.dumps({"files": listed | more}))
        fill(out, overwrite=True)
        assert contents(tmp_path) == NEW | {"mine": "0"}

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', '{"files": {"config.json": ""}}', "\udcff"])
    def test_a_damaged_manifest_is_none(self, tmp_path, text):
        out = earlier(tmp_path / "out")
        (out / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(FileExistsError, match="holds"):
            fill(out, overwrite=True)
        assert contents(tmp_path) == OLD

    def test_an_empty_folder_is_filled(self, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        fill(out)
        assert contents(out) == {"a": "1"}

    @pytest.mark.parametrize("before", [False, True])
    def test_what_comes_meanwhile_is_not_replaced(self, tmp_path, before):
        out = tmp_path / "out"
        if before:
            earlier(out)
        with pytest.raises(FileExistsError, match="holds theirs"):
            fill(out, meanwhile=out / "theirs", overwrite=True)
        assert contents(tmp_path) == {"out/theirs": "2"} | (OLD if before else {})

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_file_is_never_replaced(self, tmp_path, overwrite):
        (tmp_path / "out").write_text("a file")
        for out in (tmp_path / "out", tmp_path / "out" / "below"):
            with pytest.raises(FileExistsError, match="out is a file"):
                fill(out, overwrite=overwrite)


class TestAround:
    """A destination that is or contains what the block reads, or where the user is, is refused always."""

    @pytest.fixture(autouse=True)
    def places(self, tmp_path, monkeypatch):
        for name in ("work", "home", "models/dense", "elsewhere"):
            (tmp_path / name).mkdir(parents=True)
        (tmp_path / "models" / "dense.gguf").write_text("")
        (tmp_path / "link").symlink_to(tmp_path / "models")
        monkeypatch.chdir(tmp_path / "work")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))

    @pytest.mark.parametrize("name", ["dense", "dense.gguf"])
    @pytest.mark.parametrize("out", ["models", "link", "", "work", "home", "/", "."])
    def test_refused(self, tmp_path, name, out):
        out = out if out == "." else tmp_path / out
        with pytest.raises(InputError, match=r"is or contains .*: choose another folder"):
            check_destination(out, overwrite=True, inputs=[tmp_path / "link" / name])

    def test_the_model_itself(self, tmp_path):
        for out in ("models/dense", "link/dense", "../models/dense"):
            with pytest.raises(InputError, match="is or contains the input"):
                check_destination(
                    tmp_path / "work" / out if out[0] == "." else tmp_path / out, inputs=["~/../models/dense"]
                )

    @pytest.mark.parametrize("out", ["/proc/out", "/proc/self/out", "/sys/kernel/out", "/dev/out", "/dev/null"])
    def test_folders_of_the_system(self, out):
        with pytest.raises(InputError, match=r" lies in /(proc|sys|dev), .*: choose another folder"):
            check_destination(out)

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc, whose modes promise what it refuses")
    def test_a_file_system_that_refuses(self, monkeypatch):
        monkeypatch.setattr(written, "SYSTEM", ())
        with pytest.raises(PermissionError, match=r"/proc cannot be written .*: choose another folder"):
            check_destination("/proc/out")

    @pytest.mark.skipif(not Path("/dev/shm").exists(), reason="no shared memory")
    def test_shared_memory(self):
        check_destination("/dev/shm/awq_jax_out")

    def test_a_link_to_itself(self, tmp_path):
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        with pytest.raises(InputError, match="loop is a link that leads back to itself"):
            check_destination(tmp_path / "loop")

    @pytest.mark.parametrize("out", ["models/dense/new", "work/new", "home/new", "elsewhere"])
    def test_allowed(self, tmp_path, out):
        check_destination(tmp_path / out, inputs=[tmp_path / "models/dense", "org/model", "self"])


class TestInPlace:
    """Mount points, and folders in one that cannot be written."""

    @pytest.fixture(params=["a mount", "a parent that is read-only"])
    def out(self, request, tmp_path, monkeypatch):
        out = tmp_path / "out"
        out.mkdir()
        monkeypatch.setattr(written, "exchange", lambda a, b: pytest.fail("exchanged"))
        if request.param == "a mount":
            monkeypatch.setattr(written, "is_mount", lambda folder: folder == out)
        else:
            monkeypatch.setattr(written, "writable", lambda folder: folder != tmp_path)
        return out

    def test_filled_and_filled_again(self, tmp_path, out):
        earlier(out)
        assert contents(tmp_path) == OLD
        with written_whole(out, overwrite=True) as scratch:
            assert scratch.is_relative_to(out)
            (scratch / "a").write_text("1")
        assert contents(tmp_path) == NEW

    def test_foreign_files_stay(self, tmp_path, out):
        (out / "mine").write_text("0")
        with pytest.raises(FileExistsError, match="holds mine"):
            fill(out, overwrite=True)
        assert contents(tmp_path) == {"out/mine": "0"}

    def test_what_belongs_to_the_file_system_is_no_file_of_anyone(self, out):
        (out / "lost+found").mkdir()
        fill(out)


def test_folders_that_cannot_be_written_are_refused_before_the_block_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(written, "writable", lambda folder: False)
    with pytest.raises(PermissionError, match="cannot be written: choose another"):
        fill(tmp_path / "out")


def test_mounts(tmp_path):
    assert written.is_mount(Path("/"))
    assert not written.is_mount(tmp_path)


def test_a_real_mount(tmp_path):
    """A folder mounted on itself, which os.path.ismount does not see."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    out = tmp_path / "o ut"
    earlier(out)
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_formats_written import Path, fill
fill(Path({str(out)!r}), overwrite=True)
"""
    script = 'mount --bind "$OUT" "$OUT" || exit 77; exec "$PYTHON" -c "$PROGRAM"'
    names = os.environ | {"OUT": str(out), "PYTHON": sys.executable, "PROGRAM": program}
    command = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script]
    done = subprocess.run(command, env=names, capture_output=True, text=True, check=False)
    if (done.returncode in (1, 77) and "unshare" in done.stderr) or done.returncode == 77:
        pytest.skip("no namespace to mount in")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == {"o ut/a": "1"}


def test_modes(tmp_path):
    out = earlier(tmp_path / "out")
    before = os.umask(0o027)
    try:
        assert out.stat().st_mode & 0o777 != 0o700
        out.chmod(0o700)
        fill(out, overwrite=True)
        fill(tmp_path / "fresh")
    finally:
        os.umask(before)
    assert [p.stat().st_mode & 0o777 for p in (out, out / "a", tmp_path / "fresh")] == [0o700, 0o640, 0o750]


def test_the_longest_name(tmp_path):
    fill(tmp_path / ("x" * 255))
    with pytest.raises(OSError, match="name too long"):
        check_destination(tmp_path / ("x" * 256))
    assert len(list(tmp_path.iterdir())) == 1

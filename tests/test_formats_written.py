"""Folders that appear whole or not at all."""

import errno
from pathlib import Path

import pytest

from awq_jax.formats.written import written_whole


def fill(out: Path, error: BaseException | None = None, meanwhile: Path | None = None, **options) -> None:
    """Write a file in a block; then someone may fill `meanwhile`, or an error may end the block."""
    with written_whole(out, **options) as scratch:
        (scratch / "a").write_text("1")
        if meanwhile is not None:
            meanwhile.parent.mkdir()
            meanwhile.write_text("2")
        if error is not None:
            raise error


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_folder_appears_when_the_block_ends_and_nothing_else_stays(tmp_path):
    out = tmp_path / "models" / "out"
    with written_whole(out) as scratch:
        (scratch / "a").write_text("1")
        assert not out.exists()
    assert contents(tmp_path) == {"models/out/a": "1"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [{}, {"old": "0"}])
def test_an_error_in_the_block_leaves_what_was_there(tmp_path, error, before):
    out = tmp_path / "out"
    if before:
        out.mkdir()
        (out / "old").write_text("0")
    with pytest.raises(type(error)):
        fill(out, error, overwrite=True)
    assert contents(tmp_path) == {f"out/{name}": text for name, text in before.items()}
    assert out.exists() == bool(before)


def test_a_disk_that_fills_up_at_the_last_step_brings_the_old_folder_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("0")
    rename = Path.rename

    def full_disk(self, target):
        if self.name == "new":
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full_disk)
    with pytest.raises(OSError, match="No space left"):
        fill(out, overwrite=True)
    assert contents(tmp_path) == {"out/old": "0"}


def test_a_folder_with_something_in_it_is_refused_before_the_block_runs(tmp_path):
    (tmp_path / "old").write_text("0")
    with pytest.raises(FileExistsError, match="--overwrite"), written_whole(tmp_path):
        pytest.fail("the block ran")
    assert contents(tmp_path) == {"old": "0"}


def test_an_empty_folder_is_filled(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    fill(out)
    assert contents(out) == {"a": "1"}


def test_a_folder_filled_by_someone_else_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileExistsError, match="--overwrite"):
        fill(out, meanwhile=out / "theirs")
    assert contents(tmp_path) == {"out/theirs": "2"}


def test_overwrite_replaces_the_folder_at_the_end_only(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("0")
    with written_whole(out, overwrite=True) as scratch:
        (scratch / "a").write_text("1")
        assert contents(out) == {"old": "0"}
    assert contents(tmp_path) == {"out/a": "1"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(FileExistsError, match="is a file"), written_whole(tmp_path / "out", overwrite=overwrite):
        pytest.fail("the block ran")

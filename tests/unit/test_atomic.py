"""The order of what reaches the disk: a name never points at bytes that could still be lost."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from ray_app.store import atomic
from ray_app.store.atomic import make_folder, partial_file, staged_folder, write_file


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(call, name) of every fsync and rename, in their order."""
    seen: list[tuple[str, str]] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(handle: int) -> None:
        seen.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        real_fsync(handle)

    def rename(self: Path, target: Any) -> Path:
        seen.append(("rename", Path(target).name))
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    return seen


def test_a_file_s_bytes_are_on_the_disk_before_it_gets_its_name_and_the_name_after(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    write_file(tmp_path / "file", b"data")
    assert calls == [("fsync", ".file.partial"), ("rename", "file"), ("fsync", tmp_path.name)]
    assert (tmp_path / "file").read_bytes() == b"data"


def test_all_bytes_are_written_before_the_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda handle: sizes.append(os.fstat(handle).st_size))
    write_file(tmp_path / "file", b"x" * 100)  # less than Python's own buffer
    assert sizes[0] == 100


def test_every_file_of_a_folder_and_its_names_are_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    with staged_folder(tmp_path / "folder") as partial:
        for name in ("a", "b"):
            (partial / name).write_bytes(b"x")
    assert sorted(calls[:2]) == [("fsync", "a"), ("fsync", "b")]
    assert calls[2:] == [("fsync", ".folder.partial"), ("rename", "folder"), ("fsync", tmp_path.name)]


def test_folders_within_a_folder_can_be_entered_and_their_files_are_on_the_disk(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    with staged_folder(tmp_path / "folder") as partial:
        (partial / "part").mkdir()
        (partial / "part" / "file").touch(0o600)
    assert (tmp_path / "folder" / "part").stat().st_mode & 0o700 == 0o700
    assert (tmp_path / "folder" / "part" / "file").stat().st_mode & 0o777 == 0o666 & ~umask()
    assert {name for _, name in calls[:2]} == {"part", "file"}


def umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def test_each_new_folder_s_name_is_on_the_disk_before_the_next(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    make_folder(tmp_path / "a" / "b")
    assert calls == [("fsync", tmp_path.name), ("fsync", "a")]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")

    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(Exception, match=os.strerror(code)):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert not partial_file(path).exists()

"""The folder of Ray's sockets and sessions: closed to others, and short."""

import os
import stat
from pathlib import Path

import pytest

from ray_app.cluster import private_folder as module
from ray_app.cluster.private_folder import MAX_LENGTH, private_folder
from ray_app.errors import ResourceError

NAME = f"ray-app-{os.getuid()}"


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """RAY_TMPDIR, which may be long here."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(module, "MAX_LENGTH", 1000)
    return tmp_path


def test_it_is_this_users_alone_whatever_it_was(parent: Path) -> None:
    assert private_folder() == parent / NAME
    (parent / NAME).chmod(0o777)
    assert stat.S_IMODE(private_folder().stat().st_mode) == 0o700


def test_a_folder_or_link_of_somebody_else_is_refused(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (parent / "theirs").mkdir()
    (parent / NAME).symlink_to(parent / "theirs")
    with pytest.raises(ResourceError, match="is not a folder of this user"):
        private_folder()
    (parent / NAME).unlink()
    (parent / NAME).mkdir()
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    (parent / NAME).rename(parent / f"ray-app-{owner + 1}")
    with pytest.raises(ResourceError, match="set RAY_TMPDIR to another folder"):
        private_folder()


@pytest.mark.parametrize("name", ["a b", "a'b", "a#b", "a\nb", "ä"])
def test_a_temporary_folder_that_is_no_plain_word_is_not_taken(
    name: str, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (parent / name).mkdir()
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setattr("tempfile.tempdir", str(parent / name))
    assert private_folder() == Path("/tmp") / NAME


def test_a_long_temporary_folder_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of sockets may have 107 bytes; those of HAProxy are the longest."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("t" * 60)))
    folder = private_folder()
    assert folder == Path("/tmp") / NAME
    haproxy = folder / "s12345678" / ("n" * 56) / "a.4194304.tmp"
    ray = folder / "ray" / "session_2026-11-29_06-25-00_123456_4194304" / "sockets" / "plasma_store.1"
    slack = MAX_LENGTH - len(str(folder))
    assert slack >= 0
    assert all(len(str(path)) + slack <= 107 for path in (haproxy, ray))

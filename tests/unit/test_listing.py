"""Folders in which macOS or Windows left files of their own hold what they held before."""

from pathlib import Path

import pytest

from ray_app.errors import CheckpointError, StoreError
from ray_app.listing import data_in, is_data
from ray_app.reports.folder import claim_report_folder
from ray_app.store.atomic import CHECKSUMS_FILE, sha256_bytes, verify_folder
from ray_app.store.capture_store import CAPTURE_SETTINGS, claim_capture
from ray_app.store.filesystem import open_storage

LEFT = ("._model.safetensors", ".DS_Store", "Thumbs.db", "desktop.ini")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that somebody has only looked into."""
    for name in LEFT:
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "__MACOSX").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "name", [*LEFT, "__MACOSX", "THUMBS.DB", "._.DS_Store", "lost+found", "@eaDir", "$RECYCLE.BIN", "Icon\r"]
)
def test_what_systems_leave_is_no_data(name: str) -> None:
    assert not is_data(name)


@pytest.mark.parametrize("name", ["model.safetensors", ".prepare", "_", "a._b", "Thumbs.db.png", "desktop"])
def test_everything_else_is(name: str) -> None:
    assert is_data(name)


def test_a_folder_that_holds_nothing_else_is_empty(folder: Path) -> None:
    assert data_in(folder) == []
    assert open_storage(folder).listdir() == set()
    claim_report_folder(folder)
    claim_capture(folder, {})
    assert open_storage(folder).listdir() == {CAPTURE_SETTINGS, "shards"}
    with pytest.raises(StoreError, match=r"another file \(capture.json\)"):
        claim_report_folder(folder)


def test_checksums_are_of_what_a_checkpoint_holds(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"{}")
    sums = f"{sha256_bytes(b'{}')}  config.json\n".encode()
    (folder / CHECKSUMS_FILE).write_bytes(sums)
    assert verify_folder(folder) == sha256_bytes(sums)
    (folder / "other.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"does not list other\.json"):
        verify_folder(folder)

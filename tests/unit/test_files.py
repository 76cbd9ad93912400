"""Files that several processes write at one moment, scratch folders, and disks without room for names."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ray_app import cli
from ray_app.commands.prepare.sole_builder import sole_builder
from ray_app.data.array_store import claim_folder
from ray_app.errors import StoreError
from ray_app.runs.run_dir import RunDir, validate_relative_path
from ray_app.store.atomic import disk_errors, write_file
from ray_app.store.filesystem import RemoteDir, open_storage
from ray_app.store.manifest import SCRATCH


def at_once(count: int, action: Callable[[int], object]) -> list[object]:
    """Results, or errors, of an action that threads start at one moment."""
    barrier, results = threading.Barrier(count), []

    def run(n: int) -> None:
        barrier.wait()
        try:
            results.append(action(n))
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_file_that_several_write_at_once_is_whole(tmp_path: Path) -> None:
    contents = [bytes([n]) * 100_000 for n in range(8)]
    assert at_once(8, lambda n: write_file(tmp_path / "x", contents[n])) == [None] * 8
    assert (tmp_path / "x").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_of_several_that_create_a_run_at_one_moment_one_has_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    results = at_once(8, lambda n: run.create({"n": n}) or n)
    [winner] = [result for result in results if isinstance(result, int)]
    assert run.metadata() == {"n": winner}
    assert all("already holds something" in str(result) for result in results if result != winner)


def test_two_that_prepare_one_store_do_not_do_so_at_once(tmp_path: Path) -> None:
    (tmp_path / SCRATCH).mkdir()
    with sole_builder(tmp_path), pytest.raises(StoreError, match="another `prepare` is at work in"):
        sole_builder(tmp_path).__enter__()
    with sole_builder(tmp_path):
        pass


def test_two_that_prepare_arrays_in_one_folder_do_not_do_so_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "a.npz", event=np.ones((3, 2)), target=np.ones((3, 2)))
    argv = ["prepare", "arrays", str(tmp_path / "a.npz"), "--out", str(tmp_path / "store")]
    claim_folder(open_storage(tmp_path / "store"))
    (tmp_path / "store" / "arrays-00000.parquet").write_bytes(b"of the other one")
    with sole_builder(tmp_path / "store"):
        assert cli.run(argv) == 2
    assert "another `prepare` is at work in" in capfd.readouterr().err.replace("\n", " ")
    assert (tmp_path / "store" / "arrays-00000.parquet").read_bytes() == b"of the other one"
    assert cli.run(argv) == 0
    assert SCRATCH not in os.listdir(tmp_path / "store")


def test_a_disk_without_inodes_is_no_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free_names, words in ((0, "no inodes are left"), (9, "10 bytes are needed, 4,096 bytes are free")):
        disk = SimpleNamespace(f_files=100, f_favail=free_names, f_bavail=1, f_frsize=4096)
        monkeypatch.setattr(os, "statvfs", lambda _, disk=disk: disk)
        with pytest.raises(StoreError, match=words), disk_errors(tmp_path / "x", 10):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_that_is_listed_as_a_folder_is_an_answer(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = RemoteDir(f"file://{tmp_path}", 60.0, tell=pytest.fail)
    with pytest.raises(NotADirectoryError):
        folder.listdir("file")
    assert not RemoteDir(f"file://{tmp_path}/file", 60.0, tell=pytest.fail).exists()


@pytest.mark.parametrize("name", ["../x", "/etc", "checkpoints/../../x", "a/b/c", "", 3, None, ["x"]])
def test_a_name_in_a_run_that_leads_out_of_it_is_refused(name: object) -> None:
    with pytest.raises(StoreError, match="is no folder of a run"):
        validate_relative_path(name)  # type: ignore[arg-type]

"""A disk that is full or read-only costs nothing that was whole, and the error names the file and the bytes.

The disk is a real one: a small tmpfs of its own, where this user may mount one, filled to the last page.
"""

import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from numpy_source import SMALL, NumpySource
from small_saves import found, save

from ray_app.commands.prepare.store_builder import build_task, claim_store, finish, finished
from ray_app.errors import StoreError
from ray_app.runs.event_log import EventLog, entries
from ray_app.runs.run_dir import RunDir
from ray_app.store.atomic import write_file
from ray_app.store.manifest import Features
from ray_app.store.pair_store import PairStore

PAGE = 4096
DISK_PAGES = 100
HIDDEN = 64
"""A checkpoint of some pages."""
BOTH = Features(event=SMALL, target=SMALL)


def mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 100 pages."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", f"size={DISK_PAGES * PAGE}", "tmpfs", str(folder))
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave_pages: int) -> Path:
    """Fills the disk but for so many pages. Returns the file that does it."""
    ballast = disk / "ballast"
    ballast.write_bytes(b"")
    with ballast.open("wb", buffering=0) as file:
        for _ in range(_free_pages(disk) - leave_pages):
            file.write(bytes(PAGE))
    assert _free_pages(disk) == leave_pages
    return ballast


def test_a_save_on_a_disk_with_any_room_is_whole_or_leaves_the_epoch_before(disk: Path) -> None:
    errors = []
    for pages in range(DISK_PAGES):
        run = RunDir(disk / f"run_{pages}")
        run.create({})
        save(run, 1, HIDDEN)
        ballast = fill(disk, pages)
        try:
            save(run, 2, HIDDEN)
        except StoreError as error:
            errors.append(str(error))
            epoch = found(run)
            expected = 2 if "best.json" in errors[-1] else 1
            assert epoch == expected
            assert not list(run.path.rglob(".*.partial")), "what did not fit takes room"
            ballast.unlink()
            save(run, epoch + 1)
            assert found(run) == epoch + 1
        else:
            break
        shutil.rmtree(run.path)
    assert found(run) == 2
    assert len(errors) > 10
    assert all("cannot be written: No space left on device" in text and "bytes are free" in text for text in errors)
    assert all(str(disk) in text for text in errors)
    named = ("training_state/epoch_0002", "checkpoints/epoch_0002", "best.json")
    assert all(any(name in text for text in errors) for name in named), "the disk filled up at each of the three"


def test_a_prepare_on_a_disk_with_any_room_keeps_finished_files_and_continues(disk: Path, small_store: Path) -> None:
    source = NumpySource()
    tasks = source.tasks()
    errors = []
    for pages in range(0, DISK_PAGES, 3):
        store = disk / "store"
        ballast = fill(disk, pages)
        kept = []
        try:
            claim_store(store, source, tasks, BOTH)
            for task in tasks:
                kept.append(build_task(source, task, store, BOTH))
            finish(store, source, kept, BOTH, 0.0)
        except StoreError as error:
            errors.append(str(error))
            assert not (store / "manifest.json").exists()
            assert [finished(store, task) for task in tasks] == kept + [None] * (len(tasks) - len(kept))
            ballast.unlink()
            claim_store(store, source, tasks, BOTH)
            rest = [build_task(source, task, store, BOTH) for task in tasks[len(kept) :]]
            finish(store, source, [*kept, *rest], BOTH, 0.0)
        else:
            break
        PairStore.open(store).verify()
        assert _contents(store) == _contents(small_store)
        shutil.rmtree(store)
    assert _contents(store) == _contents(small_store)
    assert len(errors) > 5
    assert all("cannot be written: No space left on device" in text and str(store) in text for text in errors)
    assert all("bytes are needed" in text for text in errors if ".parquet" in text)
    assert any(".parquet" in text for text in errors)


def test_an_event_log_on_a_full_disk_keeps_every_line_that_was_written(disk: Path) -> None:
    run = disk / "run"
    run.mkdir()
    with EventLog(run) as log:
        log.write("step", global_step=1)
        ballast = fill(disk, 1)
        steps = 1

        def write_until_full() -> None:
            nonlocal steps
            while True:
                log.write("step", global_step=steps + 1, text="x" * 100)
                steps += 1

        with pytest.raises(StoreError, match=r"events\.jsonl cannot be written: No space left on device"):
            write_until_full()
        assert steps > 10
        assert [line["global_step"] for line in entries(run)] == list(range(1, steps + 1))
        ballast.unlink()
        log.write("step", global_step=steps + 1)
    with EventLog(run) as log:
        log.write("step", global_step=steps + 2)
    assert [line["global_step"] for line in entries(run)] == list(range(1, steps + 3))


def test_on_a_disk_that_has_become_read_only_all_that_is_there_can_be_read(disk: Path) -> None:
    run = RunDir(disk / "run")
    run.create({})
    with EventLog(run.path) as log:
        log.write("step", global_step=1)
    save(run, 1, HIDDEN)
    mount("-o", "remount,ro", str(disk))
    where = "cannot be written: Read-only file system"
    with pytest.raises(StoreError, match=f"epoch_0002 {where}"):
        save(run, 2, HIDDEN)
    with pytest.raises(StoreError, match=f"store.* {where}"):
        claim_store(disk / "store", NumpySource(), NumpySource().tasks(), BOTH)
    with pytest.raises(StoreError, match=f"a {where}"):
        write_file(disk / "a", b"1")
    assert found(run) == 1
    assert [line["global_step"] for line in entries(run.path)] == [1]


def test_a_file_that_may_not_grow_so_large_is_reported_with_its_bytes_and_leaves_the_old_one(tmp_path: Path) -> None:
    path, limit = tmp_path / "a", 8 << 20
    write_file(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(StoreError, match=f"{path} cannot be written: File too large; 8,388,609 bytes are needed"):
            write_file(path, bytes(limit + 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"old")]


def _free_pages(disk: Path) -> int:
    return shutil.disk_usage(disk).free // PAGE


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}

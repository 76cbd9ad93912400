"""A machine that does not see the input says so with its name, and sets no pair aside for it."""

import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dsec_drives import dsec, write_small
from numpy_source import SMALL, NumpySource
from PIL import Image

from ray_app.cluster import connection
from ray_app.commands.prepare import command as preparing
from ray_app.commands.prepare.store_builder import SCRATCH
from ray_app.config.prepare import PrepareFlags
from ray_app.errors import ResourceError
from ray_app.sources.base import RawPair, RejectedPair, Source, SourceTask, require_visible
from ray_app.sources.davis.source import DavisSource
from ray_app.sources.eventgpt.source import EventGptSource
from ray_app.sources.recorded import WindowingConfig
from ray_app.sources.video import VideoSource


def drive(folder: Path) -> Source:
    write_small(folder, frames=3, constants=None)
    return dsec(folder, (100_000,))


def clips(folder: Path) -> Source:
    for part in ("event_image", "video"):
        clip = folder / part / "seq" / ("0" if part == "video" else "")
        clip.mkdir(parents=True)
        for i in range(5):
            picture = Image.fromarray(np.full((8, 8, 3), 9, np.uint8))
            picture.save(clip / (f"{i}.png" if part == "video" else f"0_{i}.png"))
    return EventGptSource(folder, 1_000_000, 500_000)


def frames(folder: Path) -> Source:
    folder.mkdir()
    for i in range(30):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / f"{i}.png")
    return VideoSource((folder,), 20.0, 0, 8, 8, 100_000, 1)


@pytest.mark.parametrize("made", [drive, clips, frames])
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_root_that_is_missing_or_an_empty_mount_point_is_named_with_the_machine(
    made: Any, how: str, tmp_path: Path
) -> None:
    root = tmp_path / "input"
    source = made(root)
    (task, *_) = source.tasks()
    assert any(isinstance(item, RawPair) for item in source.pairs(task))
    shutil.rmtree(root)
    if how == "empty":
        root.mkdir()
    with pytest.raises(ResourceError, match=f"missing or empty on {socket.gethostname()}.*mount the input"):
        list(source.pairs(task))


def test_a_recording_that_is_not_there_is_named_too(shared_data: Path, tmp_path: Path) -> None:
    file = tmp_path / "sample.aedat4"
    shutil.copy(shared_data / "pairs" / "sample.aedat4", file)
    of_davis, root = DavisSource((file,), WindowingConfig((50_000,))), tmp_path / "dsec"
    tasks = of_davis.tasks()
    file.unlink()
    with pytest.raises(ResourceError, match=r"sample\.aedat4 is missing or empty on"):
        list(of_davis.pairs(tasks[0]))
    files, of_dsec = write_small(root, frames=3, constants=None), dsec(root, (100_000,))
    tasks = of_dsec.tasks()
    files.events.unlink()
    with pytest.raises(ResourceError, match=r"events\.h5 is missing or empty on"):
        list(of_dsec.pairs(tasks[0]))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_prepare_ends_with_it_and_resumes_once_the_input_is_there(tmp_path: Path) -> None:
    mount = tmp_path / "mount"

    @dataclass(frozen=True)
    class Mounted(NumpySource):
        def pairs(self, task: SourceTask) -> Iterator[RawPair | RejectedPair]:
            if task.spec["sequence"] == 5:
                require_visible(mount)
            yield from NumpySource.pairs(self, task)

    flags = PrepareFlags(out=tmp_path / "s", num_workers=1)
    with pytest.raises(ResourceError, match=rf"mount is missing or empty on {socket.gethostname()}.*repeat the com"):
        preparing.prepare(Mounted(), flags, SMALL)
    assert not (tmp_path / "s" / "rejected.jsonl").exists()
    assert not (tmp_path / "s" / SCRATCH / "drive_0005.json").exists()
    mount.mkdir()
    (mount / "recording").touch()
    result = preparing.prepare(Mounted(), flags, SMALL)
    assert (result["pairs"], result["rejected"]) == (72, 0)
    assert result["pairs_reused"] >= 12


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_on_which_no_task_ends_is_named_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "LONGEST_TASK_S", 3.0)

    @dataclass(frozen=True)
    class Hanging(NumpySource):
        def pairs(self, task: SourceTask) -> Iterator[RawPair | RejectedPair]:
            import time

            time.sleep(20 if task.spec["sequence"] else 0)
            yield from NumpySource.pairs(self, task)

    flags = PrepareFlags(out=tmp_path / "s", num_workers=1)
    with pytest.raises(ResourceError, match=r"no task ended for 3 s, and [01] of 3 are done.*`ray status`.*repeat"):
        preparing.prepare(Hanging(num_sequences=3), flags, SMALL)

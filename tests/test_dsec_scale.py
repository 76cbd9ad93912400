"""DSEC at scale: any number of tasks at a time, killed ones too, prepare the same store; counts of events hold."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from dsec_drives import BEGIN_US, NARROW, OFFSET_US, RGB, image_times, write_small
from dsec_writer import DsecFiles, random_events, write_sequence

from ray_app.config import PrepareDsec
from ray_app.jobs.prepare import run_prepare
from ray_app.store.pair_store import PairStore

NUM_DRIVES = 8


@pytest.fixture(scope="module")
def drives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight drives of 2 s: 16 tasks of two durations."""
    root = tmp_path_factory.mktemp("dsec")
    for i in range(NUM_DRIVES):
        write_small(root, f"drive_{i:02d}_{'x' * i}", frames=41)
    return root


def prepared(root: Path, out: Path, num_workers: int) -> dict[str, Any]:
    return run_prepare(PrepareDsec(out=out, root=root, durations=("200ms", "1s"), num_workers=num_workers))


def task_processes() -> list[psutil.Process]:
    """Ray's workers on this machine that are at a task of Ray Data, children of this test's own cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("ray::Map") or "ray::Map" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_cluster")
def test_one_two_and_sixteen_workers_and_killed_ones_prepare_the_same_store(drives: Path, tmp_path: Path) -> None:
    results = {num: prepared(drives, tmp_path / str(num), num) for num in (1, 2, 16)}
    assert {result["fingerprint"] for result in results.values()} == {results[1]["fingerprint"]}
    assert [results[num]["workers"] for num in (1, 2, 16)] == [1, 2, 16]
    killed: list[int] = []
    ended = threading.Event()

    def kill() -> None:
        """Up to four tasks, wherever they are."""
        while not ended.is_set() and len(killed) < 4:
            for process in task_processes()[:1]:
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)
                time.sleep(0.3)
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        survived = prepared(drives, tmp_path / "killed", 2)
    finally:
        ended.set()
        killer.join()
    assert killed, "no task was found at work"
    assert survived["fingerprint"] == results[1]["fingerprint"]
    assert (survived["pairs"], survived["quarantined"]) == (NUM_DRIVES * (19 + 3), 0)
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()
    PairStore.open(tmp_path / "killed").verify()


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_cluster")
def test_events_are_counted_covered_and_drawn(tmp_path: Path) -> None:
    files = DsecFiles(tmp_path / "dsec", "drive")
    events = random_events(50_000, OFFSET_US, BEGIN_US + 2_100_000)
    write_sequence(files, events, image_times(41), NARROW, t_offset_us=OFFSET_US, rgb_size=RGB)
    middle = run_prepare(PrepareDsec(out=tmp_path / "middle", root=files.root, step="1s"))
    each = run_prepare(PrepareDsec(out=tmp_path / "all", root=files.root, step="1s", pick="all"))
    inside = int(((events.t_us >= BEGIN_US) & (events.t_us < BEGIN_US + 2_000_000)).sum())
    assert middle["windows"] == each["windows"] == 2
    assert middle["events_covered"] == each["events_covered"] == each["events_drawn"] == inside
    assert inside // 5 - 2 <= middle["events_drawn"] <= inside // 5
    assert 0 < middle["worker_peak_bytes"] < 2**30

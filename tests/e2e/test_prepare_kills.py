"""`prepare` that is killed resumes with what is finished, and ends with the bytes of one that was left alone."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from numpy_source import SMALL, NumpySource

from ray_app.commands.prepare.command import prepare, run_prepare
from ray_app.commands.prepare.store_builder import SCRATCH, SETTINGS_FILE
from ray_app.config.prepare import PrepareFlags, PrepareScenes
from ray_app.sources.base import RawPair, RejectedPair, SourceTask
from ray_app.store.atomic import sha256_file
from ray_app.store.pair_store import PairStore

NUM_PAIRS, NUM_TASKS = 12, 12
PATIENCE_S = 400.0


def scenes(out: Path) -> PrepareScenes:
    return PrepareScenes(out=out, num_pairs=NUM_PAIRS, num_sequences=NUM_TASKS, width=64, height=48)


def finished_tasks(store: Path) -> set[str]:
    """Names of the tasks that have their record; it is written after the file."""
    return {path.stem for path in (store / SCRATCH).glob("[!.]*.json")} - {Path(SETTINGS_FILE).stem}


def killed_after(store: Path, num_finished: int) -> dict[str, int]:
    """Starts the command as a process with a Ray of its own, and kills it and its group at so many finished tasks.

    Returns when each file that was finished by then was written.
    """
    flags = ["--num-pairs", f"{NUM_PAIRS}", "--num-sequences", f"{NUM_TASKS}", "--width", "64", "--height", "48"]
    command = [sys.executable, "-m", "ray_app", "prepare", "scenes", "--out", str(store), *flags]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + PATIENCE_S
    try:
        while len(finished_tasks(store)) < num_finished:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, f"{finished_tasks(store)} after {PATIENCE_S} s"
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (store / "manifest.json").exists(), "killed too late to show anything"
    return {task: (store / f"{task}.parquet").stat().st_mtime_ns for task in finished_tasks(store)}


@pytest.mark.usefixtures("ray_cluster")
def test_killed_twice_it_keeps_every_finished_file_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    store, whole = tmp_path / "killed", tmp_path / "whole"
    after_one = killed_after(store, 1)
    after_two = killed_after(store, len(after_one) + 1)
    assert after_one.items() <= after_two.items()
    result = run_prepare(scenes(store))
    expected = run_prepare(scenes(whole))
    assert result["pairs_reused"] >= len(after_two) > 0
    assert result["fingerprint"] == expected["fingerprint"]
    assert after_two == {task: (store / f"{task}.parquet").stat().st_mtime_ns for task in after_two}
    left = {path.name: sha256_file(path) for path in store.iterdir() if not path.name.startswith(".")}
    assert left == {path.name: sha256_file(path) for path in whole.iterdir()}
    PairStore.open(store).verify()
    leftovers = [path.name for path in store.iterdir() if path.name.startswith(".")]
    assert not leftovers, "files that a kill left half written are written again under the same name"


def working_processes() -> list[psutil.Process]:
    """Ray's processes of this cluster that build something now."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "Map" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.usefixtures("ray_cluster")
def test_a_task_whose_process_dies_is_done_again_and_nothing_is_lost(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    @dataclass(frozen=True)
    class Gated(NumpySource):
        def pairs(self, task: SourceTask) -> Iterator[RawPair | RejectedPair]:
            while not gate.exists():
                time.sleep(0.05)
            yield from NumpySource.pairs(self, task)

    expected = prepare(NumpySource(), PrepareFlags(out=tmp_path / "whole", num_workers=2), SMALL)
    result: dict[str, Any] = {}
    flags = PrepareFlags(out=tmp_path / "killed", num_workers=2)
    thread = threading.Thread(target=lambda: result.update(prepare(Gated(), flags, SMALL)))
    thread.start()
    killed: set[int] = set()
    while len(killed) < 3:
        assert thread.is_alive()
        for process in working_processes()[:1]:
            if process.pid not in killed:
                process.kill()
                killed.add(process.pid)
        time.sleep(0.1)
    gate.touch()
    thread.join(PATIENCE_S)
    assert result["fingerprint"] == expected["fingerprint"]
    assert (result["pairs"], result["rejected"]) == (expected["pairs"], 0)
    PairStore.open(tmp_path / "killed").verify()

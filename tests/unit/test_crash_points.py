"""A save that is killed at any of its writes, fsyncs and renames loses nothing: the epoch before is whole, or this.

The kills are real (see syscalls.py), each of its own save. A fresh interpreter does the forking: the one that runs
the tests has Ray's threads, and a fork of those is not safe.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_saves import found, save

from ray_app.runs.run_dir import RunDir, checkpoint_name

OLD, NEW = 2, 3
"""With an epoch before both, so that the save also removes what is no longer kept."""


def killed_everywhere(folder: Path) -> dict[str, Any]:
    """Kills the save of the second epoch at each of its calls; what was found after each, by name of the call."""
    from syscalls import CannotTrace, writing_calls

    before = RunDir(folder / "before")
    before.create({})
    for epoch in range(1, NEW):
        save(before, epoch)
    whole = RunDir(shutil.copytree(before.path, folder / "whole"))
    try:
        calls = writing_calls(lambda: save(whole, NEW))
    except CannotTrace as error:
        return {"skip": str(error)}
    assert found(whole) == NEW
    epochs = []
    for k in range(len(calls)):
        run = RunDir(shutil.copytree(before.path, folder / f"killed_{k:03d}"))
        assert writing_calls(lambda run=run: save(run, NEW), kill_at=k) == calls[: k + 1]
        epoch = found(run)
        save(run, epoch + 1)
        assert found(run) == epoch + 1
        epochs.append(epoch)
    return {"calls": calls, "epochs": epochs, "again": killed_while_it_recovers(folder, before)}


def killed_while_it_recovers(folder: Path, before: RunDir) -> list[int]:
    """What is found where the newest state is damaged, after a kill at each call of the search that finds that."""
    from syscalls import writing_calls

    between = RunDir(shutil.copytree(before.path, folder / "between"))
    save(between, NEW)
    state = between.state(checkpoint_name(NEW)) / "training_state.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    search = writing_calls(RunDir(shutil.copytree(between.path, folder / "searched")).latest_resumable)
    epochs = []
    for k in range(len(search)):
        run = RunDir(shutil.copytree(between.path, folder / f"again_{k}"))
        writing_calls(run.latest_resumable, kill_at=k)
        epochs.append(found(run))
        save(run, NEW)
        assert found(run) == NEW
    return epochs


def test_a_save_killed_at_any_call_leaves_a_whole_epoch_and_the_next_save_works(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        timeout=400,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    if "skip" in report:
        pytest.skip(report["skip"])
    calls, epochs = report["calls"], report["epochs"]
    assert len(calls) == len(epochs) > 50
    assert {"write", "fsync", "openat"} <= {*calls}
    assert all(any(call.startswith(kind) for call in calls) for kind in ("rename", "mkdir", "unlink"))
    assert set(epochs) == {OLD, NEW}
    assert epochs == sorted(epochs), "once the new epoch is there, it stays"
    assert report["again"]
    assert set(report["again"]) == {OLD}


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork has none of the threads of its parent, and would wait for them
    print(json.dumps(killed_everywhere(Path(sys.argv[1]))))

"""Population-based training, as users run it: weights go from what leads to what falls behind, also after a kill."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from sweeps import FIXED, sweep_file

from ray_app.commands.tune.command import run_tune
from ray_app.commands.tune.sweep_dir import SweepDir, Trial
from ray_app.config.tune import TuneConfig
from ray_app.runs.event_log import entries
from ray_app.runs.run_dir import RunDir
from ray_app.store.checkpoint import load_checkpoint, load_training_state

pytestmark = pytest.mark.usefixtures("ray_cluster")


Place = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]


def at(run: RunDir, name: str) -> Place:
    """Weights, moments and counters of a place."""
    weights = load_checkpoint(run.checkpoint(name)).adapter.state_dict()
    return weights, *load_training_state(run.state(name))


def first_exchange(folder: SweepDir, process: "subprocess.Popen[bytes]") -> tuple[Trial, Place, Place]:
    """A trial that has just taken another's weights, where it begins, and the same place of the other."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, "it ended before anything was exchanged"
        for trial in folder.trials() if (folder.path / "events.jsonl").is_file() else []:
            run = folder.run(trial.name)
            if trial.origin and (begun := sorted((run.path / "checkpoints").glob("epoch_????"))):
                return trial, at(run, begun[0].name), at(folder.run(trial.origin), begun[0].name)
        time.sleep(0.01)
    raise AssertionError("nothing was exchanged")


def test_what_falls_behind_goes_on_from_the_weights_of_what_leads_also_after_a_kill(
    small_store: Path, tmp_path: Path
) -> None:
    """Four members, an exchange after each epoch; all is killed once a member has taken another's weights."""
    space = {"learning_rate": [1e-2, 1e-3, 1e-6, 1e-12]}
    lines = {"scheduler": "pbt", "grace_epochs": 1, "max_trials": 4, "keep_checkpoints": 0}
    fixed = FIXED | {"num_epochs": 6, "early_stop_patience": 6, "hidden_dim": 8}
    path = sweep_file(tmp_path, small_store, "population", space=space, fixed=fixed, **lines)
    folder, uri = SweepDir(tmp_path / "population"), f"sqlite:///{tmp_path / 'mlflow.db'}"
    words = [sys.executable, "-m", "ray_app", "tune", str(path), "--no-final", "--tracking-uri", uri]
    process = subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        adopted, mine, theirs = first_exchange(folder, process)
    finally:
        for pid in [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(timeout=60)
    for taken, given in zip(mine[:2], theirs[:2], strict=True):
        assert set(taken) == set(given)
        assert all(taken[name].equal(given[name]) for name in given)
    assert mine[2]["learning_rate"] == adopted.setting["learning_rate"]
    assert mine[2]["counters"]["best_epoch"] == 0, "what was best under another setting is forgotten"
    result = run_tune(TuneConfig(resume=folder.path, final=False, tracking_uri=uri))
    assert result["status"] == "finished"
    assert {trial["status"] for trial in result["trials"]} <= {"finished", "stopped"}
    trials = folder.trials()
    assert {trial.index for trial in trials if trial.status == "finished"} == {0, 1, 2, 3}, "every member ends"
    for trial in trials:
        kinds = [line for line in entries(folder.run(trial.name).path) if line["kind"] in ("resumed", "step")]
        assert kinds[0]["kind"] == ("resumed" if trial.origin else "step")
        assert not trial.origin or kinds[0]["epoch"] >= 1, "it begins after epochs of the other's"

"""The process of a trial of several workers, at a URI: it passes on what they log, and leaves signals alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from ray_app.commands.tune import trial
from ray_app.commands.tune.trials import Trial
from ray_app.config.train import TrainConfig
from ray_app.runs import succession
from ray_app.runs.event_log import entries
from ray_app.runs.run_dir import STOP, RunDir
from ray_app.store.filesystem import RemoteDir


def test_a_stop_of_the_sweeps_driver_stays_until_the_workers_have_seen_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group's process has no such file of its own."""
    monkeypatch.setattr(succession, "SYNC_INTERVAL_S", 0.02)
    there = RemoteDir(f"file://{tmp_path}/there", 1.0)
    driver, worker = RunDir(tmp_path / "driver", there), RunDir(tmp_path / "worker", there)
    driver.create({"name": "t"})
    with driver.event_log() as log:
        log.write("run_started", time=0.0)

    @contextmanager
    def open_copy(_: str) -> Iterator[RunDir]:
        yield RunDir(tmp_path / "group", there)

    def group(_: trial.TrialSpec, run: RunDir, __: Any) -> None:
        """What the workers do while the group's process waits for them."""
        driver.stop_file.touch()
        driver.mirror.push_signals(STOP)
        for n in range(2, 5):
            with worker.event_log() as log:
                log.write("step", global_step=n)
            wait_until(lambda n=n: len(entries(run.path)) == n)  # a round of the background thread
        assert STOP in there.listdir()
        with worker.event_log() as log:
            wait_until(worker.stop_file.exists)
            log.write("stopped", global_step=4)

    monkeypatch.setattr(trial, "open_run", open_copy)
    monkeypatch.setattr(trial, "train_group", group)
    spec = trial.TrialSpec(Trial(0, "t", {}, 1), TrainConfig(store="S", out=there.uri), "lift", False, {})
    trial.run_group_trial({"trial": spec}, {"all": None})  # type: ignore[dict-item]
    driver.refresh()
    assert [line["kind"] for line in entries(driver.path)][-2:] == ["stopped", "run_ended"]

"""The process of a trial: what it logs at its end; with several workers, at a URI, it leaves signals alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from waiting import wait_until

from ray_app.commands.tune import trial
from ray_app.commands.tune.trials import Trial
from ray_app.config.train import TrainConfig
from ray_app.runs import succession
from ray_app.runs.event_log import EventLog, entries
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


@pytest.mark.parametrize(
    ("logged", "ends"),
    [([], ["FINISHED"]), (["failed"], ["FAILED"]), (["stopped"], []), (["run_ended"], ["KILLED"])],
)
def test_a_trial_whose_last_epoch_was_saved_before_its_process_began_has_finished(
    logged: list[str], ends: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left to train then. `logged`: kinds that training logs itself."""
    run = RunDir(tmp_path / "run")
    run.create({"name": "t"})
    with run.event_log() as log:
        log.write("run_started", time=0.0)

    def train(_: trial.TrialSpec, __: RunDir, log: EventLog, ___: Any) -> None:
        for kind in logged:
            log.write(kind, time=1.0, status="KILLED")

    context = SimpleNamespace(get_node_id=lambda: "n")
    monkeypatch.setattr(trial, "train_here", train)
    monkeypatch.setattr(trial, "ray", SimpleNamespace(get_runtime_context=lambda: context, nodes=list))
    spec = trial.TrialSpec(Trial(0, "t", {}, 1), TrainConfig(store="S", out=str(run)), "lift", False, {})
    trial.run_trial({"trial": spec}, {"all": None})  # type: ignore[dict-item]
    lines = entries(run.path)
    assert [line["status"] for line in lines if line["kind"] == "run_ended"] == ends

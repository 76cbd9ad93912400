"""Carrying a journal to MLflow: nothing is lost, nothing is told twice, nobody waits for a silent server."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from ray_app.config import TrackingFlags
from ray_app.errors import ConfigError
from ray_app.jobs import tracking
from ray_app.jobs.journal import Journal
from ray_app.jobs.progress import TrainingProgress
from ray_app.jobs.tracking import Tracker, points, shown, tracking_uri


def step_line(step: int) -> dict[str, Any]:
    return {"loss": 1.0 / step, "epoch": 1, "global_step": step, "time": 1000.0 + step}


@pytest.fixture
def flags(tmp_path: Path) -> TrackingFlags:
    return TrackingFlags(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")


def test_a_server_that_comes_back_gets_every_point_in_one_run(
    flags: TrackingFlags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    away = threading.Event()

    class Flaky(MlflowClient):
        def log_batch(self, *args: Any, **kwargs: Any) -> Any:
            if away.is_set():
                raise MlflowException("connection refused")
            return super().log_batch(*args, **kwargs)

    monkeypatch.setattr(tracking, "MlflowClient", Flaky)
    away.set()  # the run is made, but its parameters do not get through
    with Journal(tmp_path) as journal:
        journal.write("start")
        tracker = Tracker(flags, tmp_path, "name", {"lr": 0.1}, {"tag": "t"})
        assert tracker.run_id is None
        for step in range(1, 1001):  # more than one request holds
            journal.write("step", **step_line(step))
        away.clear()
    assert tracker.close("FINISHED")
    client = MlflowClient(tracking_uri(flags))
    (run,) = client.search_runs([client.get_experiment_by_name("alignment").experiment_id])
    assert run.info.run_id == tracker.run_id
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1"}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(step, 1.0 / step) for step in range(1, 1001)]
    assert capsys.readouterr().err.count("does not answer") == 1


def test_a_server_that_never_answers_is_not_waited_for(
    flags: TrackingFlags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    silence = threading.Event()
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.2)

    def connect(uri: str) -> MlflowClient:
        silence.wait()
        raise MlflowException(f"{uri}: no route")

    monkeypatch.setattr(tracking, "MlflowClient", connect)
    with Journal(tmp_path) as journal:
        journal.write("start")
    began = time.monotonic()
    tracker = Tracker(flags, tmp_path, "name", {}, {})
    assert not tracker.close("FINISHED")
    assert time.monotonic() - began < 5
    assert tracker.run_id is None
    assert "no answer in time" in capsys.readouterr().err
    silence.set()


def test_an_epoch_becomes_flat_names_that_mlflow_takes() -> None:
    line = {
        "kind": "epoch",
        "time": 2.5,
        "global_step": 7,
        "epoch": 1,
        "val": {"pairs": 3, "cosine_accept_rate": {"0.80": 0.5}, "percentiles": {"P10": 0.1}},
        "save_seconds": None,
    }
    found = {point.key: (point.value, point.step, point.timestamp) for point in points(line)}
    assert found == {
        "epoch/epoch": (1.0, 7, 2500),
        "epoch/val/pairs": (3.0, 7, 2500),
        "epoch/val/cosine_accept_rate_0.80": (0.5, 7, 2500),
        "epoch/val/percentiles/P10": (0.1, 7, 2500),
    }
    assert points({"kind": "resume", "epoch": 1, "global_step": 7, "time": 1.0}) == []


def test_a_database_in_the_current_folder_gets_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(TrackingFlags()) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri(TrackingFlags(tracking_uri="sqlite:////x/y.db")) == "sqlite:////x/y.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking_uri(TrackingFlags()) == "http://server:5000"
    with pytest.raises(ConfigError, match="use sqlite:///FILE"):
        tracking_uri(TrackingFlags(tracking_uri="file:///mlruns"))


def test_no_password_is_shown() -> None:
    assert shown("cannot reach http://me:secret@host:5000/x") == "cannot reach http://***@host:5000/x"


def test_off_a_terminal_progress_is_one_line_for_each_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = {"loss": 0.2, "cos_sim_mean": 0.9, "cosine_accept_rate": {"0.80": 0.75}}
    with Journal(tmp_path) as journal:
        journal.write("step", cos_sim=0.5, pairs=8, seconds=1.0, **step_line(1))
        train = {"loss": 0.25, "cos_sim": 0.8, "pairs": 16, "seconds": 2.0}
        journal.write("epoch", epoch=1, train=train, val=val)
    with TrainingProgress(tmp_path, 2):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert " ".join(line.split()) == (
        "epoch 1 train loss 0.2500 cos_sim 0.8000 val loss 0.2000 cos_sim 0.9000 accepted at 0.80 75.0% 8.0 pairs/s"
    )

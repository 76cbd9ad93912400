"""Sweeps in a real S3 server: every trial is kept there, and any other machine resumes from the URI alone."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from s3_process import S3
from sweeps import sweep_config

from ray_app import cli
from ray_app.commands.tune.command import run_tune
from ray_app.commands.tune.sweep_dir import SweepDir, open_sweep
from ray_app.errors import StoreError
from ray_app.runs.event_log import EVENT_LOG, entries
from ray_app.runs.run_dir import CHECKPOINTS, STATES, RunDir
from ray_app.runs.succession import Successors
from ray_app.store.atomic import sha256_file
from ray_app.store.checkpoint_transfer import local_folder
from ray_app.store.filesystem import RemoteDir

FIXED = {"strategy": "lightweight", "batch_size": 8, "num_epochs": 6, "dropout": 0.0}
SPACE = {"hidden_dim": [8, 16, 24]}


def sweep_file(path: Path, store: Path, out: str, **lines: Any) -> Path:
    sweep = {
        "store": str(store),
        "out": out,
        "base": FIXED,
        "space": SPACE,
        "search_alg": "grid",
        "scheduler": "none",
    }
    path.write_text(yaml.safe_dump(sweep | {"num_final_seeds": 1} | lines))
    return path


def kill_with_children(process: "subprocess.Popen[bytes]") -> None:
    for pid in [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout=400)


@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_of_which_nothing_is_left_but_the_uri_resumes_and_finds_the_same_winner(
    s3: S3,
    small_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    uri, database = s3.uri("bucket/sweeps/one"), f"sqlite:///{tmp_path / 'mlflow.db'}"
    file, tracking = sweep_file(tmp_path / "one.yaml", small_store, uri), ["--tracking-uri", database]
    words = [sys.executable, "-m", "ray_app", "tune", str(file), *tracking]
    process = subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 400
    saved = re.compile(r"sweeps/one/trials/trial_0001-\w+/training_state/epoch_0001/MANIFEST.sha256")
    while not any(map(saved.fullmatch, s3.keys("bucket"))):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill_with_children(process)
    with open_sweep(uri) as sweep:
        sweep.refresh()
        before = attempts(sweep)
        ended = {trial.name for trial in sweep.trials() if trial.ended_at is not None}

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    assert cli.run(["tune", "--resume", uri, *tracking, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [trial["status"] for trial in result["trials"]] == ["finished"] * 3
    assert result["sweep"] == uri
    undisturbed = sweep_file(tmp_path / "two.yaml", small_store, str(tmp_path / "two"))
    whole = run_tune(sweep_config(undisturbed, tracking_uri=database, final=False))
    same = ("id", "objective", "lift", "steps", "epochs", "parameters")
    assert [[trial[key] for key in same] for trial in result["trials"]] == [
        [trial[key] for key in same] for trial in whole["trials"]
    ]
    assert result["final"]["run"].startswith(f"s3://bucket/sweeps/one/final/{result['best']['trial']}/seed_0")
    assert result["best"]["checkpoint"].startswith("s3://bucket/sweeps/one/trials/trial_")
    with local_folder(result["best"]["checkpoint"]) as best:
        assert sha256_file(best / "model.safetensors") == sha256_file(
            Path(whole["best"]["checkpoint"]) / "model.safetensors"
        )

    keys = [key.removeprefix("sweeps/one/") for key in s3.keys("bucket") if key.startswith("sweeps/one/")]
    assert {"sweep.json", "sweep.html", f"final/{result['best']['trial']}/seed_0-report/report.html"} <= set(keys)
    weights = [key for key in keys if key.startswith("trials/") and key.endswith("model.safetensors")]
    assert len(weights) == 3, "of each trial the best alone is kept"
    assert not any(re.search("^trials/.*/training_state/.", key) for key in keys)
    with open_sweep(uri) as sweep:
        sweep.refresh()
        assert attempts(sweep) == {name: before.get(name, 0) + (name not in ended) for name in attempts(sweep)}
        assert set(before) - ended, "one was under way"
        for run in sweep.runs("trials/*"):
            steps = [line["global_step"] for line in entries(run) if line["kind"] == "step"]
            assert steps == list(range(1, len(steps) + 1)), "each step is logged once"
    assert not list((tmp_path / "elsewhere").glob("ray-app-*")), "no copy is left"

    assert cli.run(["tune", "--watch", uri, "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == result
    assert cli.run(["sync", uri, "--tracking-uri", f"sqlite:///{tmp_path / 'new.db'}", "--json"]) == 0
    synced = json.loads(capfd.readouterr().out)
    assert len(synced["runs"]) == 1 + 3 + 1
    assert synced["points_sent"] == synced["points_in_log"] > 0
    assert cli.run(["tune", str(file), *tracking]) == 2
    assert "holds a sweep already" in " ".join(capfd.readouterr().err.split())


def attempts(sweep: SweepDir) -> dict[str, int]:
    """Number of processes that started each trial."""
    return {
        run.name: sum(line["kind"] == "workers_started" for line in entries(run)) for run in sweep.runs("trials/*")
    }


def test_what_is_at_a_uri_is_no_sweep_or_names_a_folder_outside_of_it(tmp_path: Path) -> None:
    there = RemoteDir(f"file://{tmp_path}/there", 1.0)
    copy = SweepDir(tmp_path / "copy", there)
    with pytest.raises(StoreError, match=r"is not the folder of a sweep: it has no sweep.json"):
        copy.refresh()
    copy.create({"name": "s"})
    with copy.exclusive() as log:
        log.write("final_seed", trial="t", run="final/../../outside/seed_0", time=0.0)
    other = SweepDir(tmp_path / "other", there)
    with pytest.raises(StoreError, match="which is no run of a sweep"):
        other.refresh()
    with pytest.raises(StoreError, match="holds a sweep already"):
        SweepDir(tmp_path / "third", there).create({"name": "other"})
    assert json.loads(there.read("sweep.json")) == {"name": "s"}


def test_an_event_log_that_is_lent_at_a_uri_holds_what_another_process_wrote_meanwhile(tmp_path: Path) -> None:
    """The driver ends a trial whose process waits for the answer to its report."""
    there = RemoteDir(f"file://{tmp_path}/there", 1.0)
    driver, trial = RunDir(tmp_path / "driver", there), RunDir(tmp_path / "trial", there)
    driver.create({"name": "t"})
    with driver.event_log() as log:
        log.write("run_started", time=0.0)
    with trial.event_log() as log:
        log.write("workers_started", time=1.0)
        with trial.released(log):
            with driver.event_log() as theirs:
                theirs.write("run_ended", status="KILLED", time=2.0)
            assert [line["kind"] for line in entries(driver.path)] == ["run_started", "workers_started", "run_ended"]
    assert [line["kind"] for line in entries(trial.path)] == ["run_started", "workers_started", "run_ended"]
    assert Successors(there, EVENT_LOG).read() == (trial.path / EVENT_LOG).read_bytes()


def test_places_that_are_let_go_of_at_a_uri_are_gone_there_too(tmp_path: Path) -> None:
    there = RemoteDir(f"file://{tmp_path}/there", 1.0)
    run = RunDir(tmp_path / "run", there)
    run.create({"name": "t"})
    for kind in (STATES, CHECKPOINTS):
        for name in ("epoch_0001", "epoch_0002"):
            there.write(f"{kind}/{name}/file", b"x")
    there.write("best.json", json.dumps({"checkpoint": f"{CHECKPOINTS}/epoch_0001"}).encode())
    assert run.best_on_disk == f"{CHECKPOINTS}/epoch_0001"
    for kind in (STATES, CHECKPOINTS):
        run.delete_checkpoints(kind, run.best_on_disk)
    assert (run.places(STATES), run.places(CHECKPOINTS)) == (set(), {"epoch_0001"})
    run.delete_checkpoints(CHECKPOINTS)
    assert run.best_on_disk is None
    assert not (run.path / EVENT_LOG).exists()

"""Sweeps as users run them: real Ray Tune, real MLflow on SQLite, small features."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow_process import missing_and_extra
from numpy_source import NumpySource, build_store
from pages import assert_opens
from sweeps import FIXED, resume, sweep_file, tune

from ray_app import cli
from ray_app.commands.evaluate.command import run_evaluate
from ray_app.commands.tune.sweep_dir import SweepDir
from ray_app.config.base import SplitConfig
from ray_app.config.evaluate import EvaluateConfig
from ray_app.errors import ConfigError, StoreError
from ray_app.runs.event_log import entries
from ray_app.store.atomic import sha256_file
from ray_app.store.checkpoint import load_checkpoint
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs
from ray_app.tracking.mlflow_logger import to_metrics

SMOKE = Path(__file__).resolve().parents[2] / "tune_configs" / "smoke.yaml"

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module")
def untestable(small_store: Path, root: Path) -> Path:
    """The store, but what only the test part needs cannot be read: bytes in the middle of its files are others."""
    store = root / "untestable"
    shutil.copytree(small_store, store)
    opened = PairStore.open(store)
    split = split_pairs(opened.index, SplitConfig())
    for file in set(opened.index.file[split.test]) - set(opened.index.file[[*split.train, *split.val]]):
        path = store / opened.files[file].name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    with pytest.raises(StoreError, match="damaged"):
        opened.read_rows(split.test)
    return store


@pytest.fixture(scope="module")
def swept(untestable: Path, root: Path) -> dict[str, Any]:
    """Three settings, of which one cannot be trained."""
    space = {"hidden_dim": [8, 16], "learning_rate": [1e-3, 1e38]}
    return tune(sweep_file(root, untestable, "grid", space=space, max_trials=3))


def test_a_sweep_never_reads_the_test_part(swept: dict[str, Any], untestable: Path, tmp_path: Path) -> None:
    """It ended well on a store whose test part cannot be read; what does read it says so."""
    assert swept["status"] == "finished"
    cfg = EvaluateConfig(store=untestable, checkpoint=swept["best"]["checkpoint"], out=tmp_path / "report")
    with pytest.raises(StoreError, match="damaged"):
        run_evaluate(cfg)


def test_a_failing_trial_is_recorded_with_its_reason_and_stops_nothing(swept: dict[str, Any]) -> None:
    assert json.loads(json.dumps(swept, allow_nan=False)) == swept
    assert {"sweep", "best", "trials", "final", "files"} <= set(swept)
    assert [trial["status"] for trial in swept["trials"]] == ["finished", "failed", "finished"]
    assert "not finite" in swept["trials"][1]["reason"]
    for trial in swept["trials"][::2]:
        assert {"id", "status", "objective", "steps", "reason"} <= set(trial)
        assert trial["epochs"] == 3
    run = SweepDir(Path(swept["sweep"])).run(swept["trials"][1]["id"])
    assert sum(line["kind"] == "workers_started" for line in entries(run.path)) == 1, "it would fail again"


def test_the_objective_is_that_of_the_checkpoint_with_its_lift_at_every_step(swept: dict[str, Any]) -> None:
    best, folder = swept["best"], SweepDir(Path(swept["sweep"]))
    assert best["objective"] == max(trial["objective"] for trial in swept["trials"] if trial["objective"] is not None)
    checkpoint = load_checkpoint(Path(best["checkpoint"]))
    assert checkpoint.metrics["val"]["cosine_accept_rate"]["0.80"] == best["objective"]
    assert checkpoint.config.hidden_dim == best["config"]["hidden_dim"]
    for trial in swept["trials"]:
        for line in entries(folder.run(trial["id"]).path):
            if line["kind"] == "epoch":
                val = line["val"]
                assert set(val["baselines"]) == {"before", "white", "mean_target", "shuffled"}
                assert val["lift"] == val["cosine_accept_rate"]["0.80"] - max(val["baselines"].values())


def test_an_ended_trial_keeps_its_best_weights_and_nothing_else(swept: dict[str, Any]) -> None:
    folder = SweepDir(Path(swept["sweep"]))
    for trial in swept["trials"][::2]:
        run = folder.run(trial["id"])
        assert list((run.path / "checkpoints").iterdir()) == [run.best()]
        assert not list((run.path / "training_state").iterdir())


def test_mlflow_holds_one_run_for_the_sweep_and_one_in_it_for_each_trial(swept: dict[str, Any], root: Path) -> None:
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    folder = SweepDir(Path(swept["sweep"]))
    runs = client.search_runs([client.get_experiment_by_name("alignment").experiment_id])
    (parent,) = [run for run in runs if run.info.run_name == "grid"]
    nested = {r.data.tags["trial"]: r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert set(nested) == {trial["id"] for trial in swept["trials"]}
    assert json.loads(parent.data.params["space"])["hidden_dim"] == [8, 16]
    assert parent.data.params["max_trials"] == "3"
    assert parent.info.status == "FINISHED"
    assert nested[swept["trials"][1]["id"]].info.status == "FAILED"
    for trial in swept["trials"]:
        points = client.get_metric_history(nested[trial["id"]].info.run_id, "train/loss")
        steps = [line for line in entries(folder.run(trial["id"]).path) if line["kind"] == "step"]
        assert len(points) == len(steps)
    objectives = client.get_metric_history(parent.info.run_id, "trial/objective")
    assert len(objectives) == 2
    assert all("@" not in point.key for line in entries(folder.path) for point in to_metrics(line))


def test_the_page_refers_to_nothing_but_its_own_folder(swept: dict[str, Any]) -> None:
    page = (Path(swept["sweep"]) / "sweep.html").read_text()
    found = re.findall(r"""(?:src|href|action)\s*=\s*["']([^"']+)|url\(["']?([^"')]+)""", page)
    references = {a or b for a, b in found}
    assert references
    outward = [each for each in references if not each.startswith(("#", "data:"))]
    assert all((Path(swept["sweep"]) / each).exists() for each in outward)
    assert "@import" not in page


def test_the_page_opens_without_a_network_wide_and_narrow(swept: dict[str, Any]) -> None:
    assert_opens(Path(swept["sweep"]) / "sweep.html")


def attempts(folder: SweepDir) -> dict[str, int]:
    """Of each trial whose event log exists: a driver that is killed may leave a trial's folder without one."""
    runs = sorted(path.parent for path in (folder.path / "trials").glob("*/events.jsonl"))
    return {run.name: sum(line["kind"] == "workers_started" for line in entries(run)) for run in runs}


@pytest.mark.slow
def test_what_is_finished_is_not_run_again_and_a_larger_budget_adds_to_it(swept: dict[str, Any], root: Path) -> None:
    folder = SweepDir(Path(swept["sweep"]))
    before = attempts(folder)
    flags = {"tracking_uri": f"sqlite:///{root / 'mlflow.db'}", "final": False}
    again = resume(folder.path, **flags)
    assert attempts(folder) == before
    assert again["best"] == swept["best"]
    more = resume(folder.path, max_trials=4, **flags)
    assert len(more["trials"]) == 4
    assert {name: count for name, count in attempts(folder).items() if name in before} == before
    with pytest.raises(ConfigError, match="use_gpu was False, is True now; leave that out"):
        resume(folder.path, use_gpu=True, **flags)


@pytest.mark.slow
def test_a_sweep_can_be_watched_and_synced(
    swept: dict[str, Any], root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["tune", "--watch", swept["sweep"], "--json"]) == 0
    shown = capfd.readouterr()
    assert "2 failed" in shown.err
    assert "trial_0000" in shown.err
    assert json.loads(shown.out)["best"]["trial"] == swept["best"]["trial"]
    assert cli.run(["sync", swept["sweep"], "--json"]) == 0
    synced = json.loads(capfd.readouterr().out)
    assert len(synced["runs"]) == 1 + len(attempts(SweepDir(Path(swept["sweep"]))))
    for run in synced["runs"]:
        assert missing_and_extra(Path(run["run"]), f"sqlite:///{root / 'mlflow.db'}", run["mlflow_run_id"]) == (0, 0)


@pytest.mark.slow
def test_a_changed_store_is_not_resumed(swept: dict[str, Any], root: Path) -> None:
    folder, other = SweepDir(root / "moved"), build_store(NumpySource(seed=9), root / "other")
    shutil.copytree(swept["sweep"], folder.path)
    about = folder.metadata()
    (folder.path / "sweep.json").write_text(json.dumps(about | {"config": about["config"] | {"store": str(other)}}))
    with pytest.raises(StoreError, match="searched on pairs of fingerprint"):
        resume(folder.path)


@pytest.mark.usefixtures("swept")
def test_a_second_sweep_of_that_name_is_refused(root: Path) -> None:
    with pytest.raises(StoreError, match="holds a sweep already"):
        tune(root / "grid.yaml")


@pytest.mark.slow
def test_where_all_fail_the_reasons_are_grouped_and_the_exit_code_is_2(
    small_store: Path, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    space = {"mse_weight": [0.0, 1.0], "cosine_weight": [0.0]}
    fixed = {key: value for key, value in FIXED.items() if key != "cosine_weight"} | {"learning_rate": 1e38}
    path = sweep_file(root, small_store, "hopeless", space=space, base=fixed)
    words = ["tune", str(path), "--no-final", "--tracking-uri", f"sqlite:///{root / 'mlflow.db'}"]
    assert cli.run(words) == 2
    err = " ".join(capfd.readouterr().err.split())
    assert "1 times: The gradient is not finite" in err
    assert "1 times: --mse-weight, --cosine-weight, " in err
    assert "are all 0" in err
    assert "does not answer" not in err, "a trial that was refused has nothing to track"


def interrupt(folder: SweepDir) -> None:
    """Ctrl-C after two epochs; or late, so that it ends in any case."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        if sum(line["kind"] == "epoch" for run in folder.runs("trials/*") for line in entries(run)) >= 2:
            break
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_an_estimate_above_the_budget_needs_a_word_and_ctrl_c_and_the_budget_end_the_search(
    small_store: Path, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    space = {"hidden_dim": [8, 16, 24, 32]}
    fixed = FIXED | {"num_epochs": 5000, "early_stop_patience": 5000}  # so that no trial comes to its end
    path, folder = sweep_file(root, small_store, "short", space=space, base=fixed), SweepDir(root / "short")
    tracking = ["--tracking-uri", f"sqlite:///{root / 'mlflow.db'}"]
    with pytest.raises(ConfigError, match=r"is above max_hours 0.005.*--yes"):
        tune(path, max_hours=0.005)
    assert not folder.path.exists(), "nothing was started"
    user = threading.Thread(target=interrupt, args=(folder,))
    user.start()
    assert cli.run(["tune", str(path), "--max-hours", "1", "--yes", *tracking]) == 130
    user.join()
    assert f"resume with: ray-app tune --resume {folder.path}" in capfd.readouterr().err
    assert folder.entries()[-1]["status"] == "KILLED"
    lines = folder.entries()
    hours = (lines[-1]["time"] - lines[0]["time"] + 3) / 3600
    result = resume(folder.path, max_hours=hours, final=False)
    assert f"--max-hours {hours:g} are used up" in capfd.readouterr().err
    assert {trial["status"] for trial in result["trials"]} == {"running"}, "they can be resumed with a larger budget"
    assert result["best"]["objective"] is not None


@pytest.mark.slow
def test_asha_stops_what_falls_behind_and_optuna_resumes_from_the_record(small_store: Path, root: Path) -> None:
    space = {"hidden_dim": [8, 12, 16], "learning_rate": {"log": [1.0e-12, 1.0e-2]}}
    lines = {
        "space": space,
        "search_alg": "optuna",
        "scheduler": "asha",
        "objective": "lift",
        "max_concurrent_trials": 1,
    }
    path = sweep_file(root, small_store, "asha", **lines, max_trials=4)
    first = tune(path)
    more = resume(root / "asha", max_trials=8)
    assert [trial["config"] for trial in more["trials"][:4]] == [trial["config"] for trial in first["trials"]]
    stopped = [trial for trial in more["trials"] if trial["status"] == "stopped"]
    assert stopped
    assert all(trial["epochs"] < 3 for trial in stopped)
    assert more["best"]["objective"] == max(trial["objective"] for trial in more["trials"])


@pytest.mark.slow
def test_a_trial_of_two_workers_is_a_ray_train_group_and_ends_as_one_of_one_does(
    small_store: Path, root: Path, swept: dict[str, Any]
) -> None:
    """Batches are the same for any number of workers, so the numbers differ by the order of sums alone."""
    space = {"hidden_dim": [8], "learning_rate": [1e-3]}
    group = tune(sweep_file(root, small_store, "group", space=space, num_workers=2, cpus_per_worker=0.5))
    assert [trial["status"] for trial in group["trials"]] == ["finished"]
    assert group["trials"][0]["id"] == swept["trials"][0]["id"], "the same setting"
    folders = [SweepDir(Path(each["sweep"])).run(each["trials"][0]["id"]).path for each in (group, swept)]
    workers = [[line["workers"] for line in entries(folder) if line["kind"] == "run_started"] for folder in folders]
    assert workers == [[2], [1]]
    losses = [[line["val"]["loss"] for line in entries(folder) if line["kind"] == "epoch"] for folder in folders]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert group["trials"][0]["steps"] == swept["trials"][0]["steps"]


def kill_a_trial(folder: SweepDir, killed: list[int]) -> None:
    """SIGKILL to one trial's process after a step of it."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        for run in (folder.path / "trials").glob("*/events.jsonl"):
            if any(line["kind"] == "epoch" for line in entries(run.parent)):
                for process in psutil.Process().children(recursive=True):
                    if "ImplicitFunc" in " ".join(process.cmdline()):
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(process.pid)
                        return
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_trial_resumes_from_its_checkpoint_and_ends_with_the_same_bytes(
    small_store: Path, root: Path
) -> None:
    """Two trials, one after the other, that differ in a patience that neither comes to need: the first is killed."""
    fixed = FIXED | {"hidden_dim": 8, "num_epochs": 100, "early_stop_patience": 100}
    path = sweep_file(
        root, small_store, "hurt", space={"plateau_patience": [200, 201]}, base=fixed, max_concurrent_trials=1
    )
    folder, killed = SweepDir(root / "hurt"), []
    killer = threading.Thread(target=kill_a_trial, args=(folder, killed))
    killer.start()
    result = tune(path)
    killer.join()
    assert killed
    hurt, clean = result["trials"]
    assert attempts(folder) == {hurt["id"]: 2, clean["id"]: 1}
    assert any(line["kind"] == "resumed" for line in entries(folder.run(hurt["id"]).path))
    (died,) = [line for line in folder.entries() if line["kind"] == "trial_process_died"]
    assert died["name"] == hurt["id"]
    assert hurt["steps"] == clean["steps"] > 100
    assert hurt["objective"] == clean["objective"]
    bests = [folder.run(trial["id"]).best() for trial in (hurt, clean)]
    weights = [sha256_file(best / "model.safetensors") for best in bests if best]
    assert len(weights) == 2
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_the_shipped_smoke_sweep_all_of_it_killed_resumes_and_the_winner_is_judged_with_several_seeds(
    small_store: Path, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As it is but for the workers of the last training."""
    path = root / "smoke.yaml"
    path.write_text(SMOKE.read_text() + "final_workers: 2\n")
    folder, uri = SweepDir(root / "killed"), f"sqlite:///{root / 'mlflow.db'}"
    tracking = ["--tracking-uri", uri, "--experiment", "killed"]
    words = [sys.executable, "-m", "ray_app", "tune", str(path), *tracking]
    words += ["--store", str(small_store), "--out", str(folder.path), "--yes"]
    process = subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 400
    while not (
        (folder.path / "events.jsonl").is_file() and any(x["kind"] == "trial_ended" for x in folder.entries())
    ):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for pid in [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout=400)
    done = {trial.name for trial in folder.trials() if trial.ended_at is not None}
    before = attempts(folder)
    assert cli.run(["tune", "--resume", str(folder.path), *tracking, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [trial["status"] for trial in result["trials"]] == ["finished"] * 4
    assert {name: count for name, count in attempts(folder).items() if name in done} == {n: before[n] for n in done}
    final = result["final"]
    assert [seed["seed"] for seed in final["seeds"]] == [0, 1]
    rates = [seed["accept_rate"] for seed in final["seeds"]]
    assert final["test"]["accept_rate"]["mean"] == pytest.approx(sum(rates) / 2)
    run = Path(final["run"])
    store = PairStore.open(small_store)
    split = split_pairs(store.index, SplitConfig())
    ends = [line for line in entries(run) if line["kind"] == "epoch"]
    assert ends[0]["train"]["pairs"] == len(split.train) + len(split.val)
    (best,) = [trial for trial in folder.trials() if trial.name == result["best"]["trial"]]
    assert ends[-1]["epoch"] == best.best_epoch
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("killed").experiment_id])
    keys = [r.data.tags["run_key"] for r in runs]
    assert len(keys) == len(set(keys)) == 1 + 4 + 2

"""Runs in a real S3 server: finished checkpoints are whole there, and any machine can resume from the URI."""

import json
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from mlflow import MlflowClient
from mlflow_process import missing_and_extra
from s3_process import S3
from small_saves import found, save
from waiting import wait_until

from ray_app import cli
from ray_app.commands.train.command import run_train
from ray_app.commands.train.context import RunContext
from ray_app.commands.train.loop import WorkerContext, WorkerData, batches_in_memory, train_epochs
from ray_app.config.train import TrainConfig
from ray_app.data.batch_order import ShardedBatchOrder
from ray_app.data.pair_tensors import PairTensors
from ray_app.errors import StoreError, TrainingError
from ray_app.runs.event_log import EventLog, entries
from ray_app.runs.run_dir import RunDir, open_run
from ray_app.store.atomic import CHECKSUMS_FILE, sha256_file
from ray_app.store.checkpoint import MODEL
from ray_app.store.filesystem import RemoteDir
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs

TINY: dict[str, Any] = {
    "strategy": "lightweight",
    "num_epochs": 8,
    "early_stop_patience": 8,
    "hidden_dim": 4,
    "batch_size": 16,
    "cpus_per_worker": 1,  # threads: with another number sums round otherwise
}


def test_a_fresh_copy_finds_what_another_saved_and_the_same_places_stay_as_on_a_disk(
    copy: Callable[[str], RunDir], s3: S3, tmp_path: Path
) -> None:
    uri = s3.uri("bucket/kept")
    run, local = copy(uri), RunDir(tmp_path / "local")
    local.path.mkdir()
    run.create({"name": "kept"})
    with run.event_log():
        for epoch in (1, 2, 3):
            save(run, epoch)
            save(local, epoch)
    assert found(copy(uri)) == 3
    there = {str(Path(key).relative_to("kept")) for key in s3.keys("bucket") if key.startswith("kept/")}
    on_disk = {str(path.relative_to(local.path)) for path in local.path.rglob("*") if path.is_file()}
    assert {key for key in there if not key.startswith(("events.jsonl", "run.json")) and "." in key} == on_disk
    with pytest.raises(StoreError, match=r"s3://bucket/kept already holds something"):
        copy(uri).create({})


def test_killed_at_any_request_a_save_leaves_a_whole_epoch_and_the_next_works(
    copy: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy("killed")
    run.create({})
    with run.event_log() as log:
        log.write("note", n=0)
        for epoch in (1, 2, 3):
            save(run, epoch)
    epochs, epoch, whole = [], 3, False
    answer = RemoteDir.retry
    while not whole:
        run, left = copy("killed"), [len(epochs) + 1]

        def dying(self: RemoteDir, verb: str, name: str, ask: Any, left: list[int] = left) -> Any:
            left[0] -= verb in ("written", "deleted")
            if left[0] <= 0:
                raise KeyboardInterrupt
            return answer(self, verb, name, ask)

        found(run)
        with suppress(KeyboardInterrupt), run.event_log(), monkeypatch.context() as patch:
            patch.setattr(RemoteDir, "retry", dying)
            save(run, epoch + 1)
            whole = True
        after = found(copy("killed"))
        epochs.append(after - epoch)
        epoch = after
        if not whole:
            with (run := copy("killed")).event_log():
                save(run, epoch + 1)
            epoch += 1
            assert found(copy("killed")) == epoch
    assert len(epochs) > 12
    assert set(epochs) == {0, 1}
    assert epochs[-1] == 1


def test_a_damaged_object_is_named_and_the_checkpoint_before_is_resumed(
    copy: Callable[[str], RunDir], s3: S3, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = s3.uri("bucket/hurt")
    run = copy(uri)
    run.create({})
    with run.event_log():
        for epoch in (1, 2):
            save(run, epoch)
    name = "training_state/epoch_0002/training_state.safetensors"
    data = run.mirror.storage.read(name)
    run.mirror.storage.write(name, data[:-1] + bytes([data[-1] ^ 1]))
    fresh = copy(uri)
    assert fresh.latest_resumable() == "epoch_0001"
    assert f"s3://bucket/hurt/{name} is damaged" in capsys.readouterr().err
    with fresh.event_log():
        save(fresh, 2)
    assert found(copy(uri)) == 2


def undisturbed(cfg: TrainConfig, out: Path) -> str:
    """SHA-256 of the weights of the same run in a folder, without Ray, computed with as many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(TINY["cpus_per_worker"])
    try:
        return weights_without_ray(cfg, out)
    finally:
        torch.set_num_threads(threads)


def weights_without_ray(cfg: TrainConfig, out: Path) -> str:
    cfg, store = cfg.at(out), PairStore.open(cfg.store)
    split = split_pairs(store.index, cfg.split_config)
    worker = WorkerContext(RunContext.of(cfg, store), 0, 1, torch.device("cpu"))
    lanes = ShardedBatchOrder(len(split.train), cfg.batch_size, cfg.seed)
    train, val = (
        PairTensors(np.arange(len(rows)), *map(torch.tensor, store.read_rows(rows)))
        for rows in (split.train, split.val)
    )
    out.mkdir()
    run, pairs = RunDir(out), WorkerData(lambda state: batches_in_memory(train, lanes, state, worker), True, val)
    with EventLog(out) as log:
        train_epochs(worker, run, pairs, log, {}, lambda *_: None)
    best = run.best()
    assert best is not None
    return sha256_file(best / MODEL)


@pytest.fixture
def killer(s3: S3) -> Iterator[Callable[[str], list[int]]]:
    """Kills a training worker once an object is there; says whom."""
    threads: list[threading.Thread] = []

    def kill_after(key: str) -> list[int]:
        killed: list[int] = []

        def watch() -> None:
            wait_until(lambda: key in s3.keys("bucket"))
            for process in psutil.Process().children(recursive=True):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)

        threads.append(threading.Thread(target=watch))
        threads[-1].start()
        return killed

    yield kill_after
    for thread in threads:
        thread.join()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_whose_processes_died_is_resumed_from_the_uri_alone_and_ends_with_the_same_bytes(
    s3: S3,
    small_store: Path,
    tmp_path: Path,
    killer: Callable[[str], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The second driver has an empty folder of its own, as on another machine."""
    uri, database = s3.uri("bucket/runs/one"), f"sqlite:///{tmp_path / 'mlflow.db'}"
    cfg = TrainConfig(store=str(small_store), out=uri, tracking_uri=database, max_failures=0, **TINY)
    killed = killer(f"runs/one/checkpoints/epoch_0002/{CHECKSUMS_FILE}")
    with pytest.raises(
        TrainingError, match=r"processes died .* resume with: ray-app train --resume 's3://bucket/runs"
    ):
        run_train(cfg)
    assert killed
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    capfd.readouterr()
    assert cli.run(["train", "--resume", uri, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["resumed_from_step"] >= 2 * result["steps"] // 8
    assert result["model_sha256"] == undisturbed(cfg, tmp_path / "undisturbed")
    assert result["run"] == uri
    assert result["checkpoint"].startswith("s3://bucket/runs/one/checkpoints/epoch_")
    assert not list((tmp_path / "elsewhere").glob("ray-app-*")), "no copy is left"
    with open_run(uri) as run:
        run.refresh()
        lines = entries(run.path)
        steps = [line["global_step"] for line in lines if line["kind"] == "step"]
        assert steps == list(range(1, result["steps"] + 1)), "each step is logged once"
        assert [line["kind"] for line in lines if line["kind"] in ("run_started", "run_ended")] == [
            "run_started",
            "run_ended",
        ] * 2
        assert run.metadata()["config"]["out"] == uri
    client = MlflowClient(database)
    tracked = client.get_run(result["mlflow_run_id"])
    assert (tracked.info.status, tracked.data.tags["event_log"], tracked.data.params["out"]) == ("FINISHED", uri, uri)
    assert cli.run(["sync", uri, "--tracking-uri", f"sqlite:///{tmp_path / 'new.db'}", "--json"]) == 0
    (synced,) = json.loads(capfd.readouterr().out)["runs"]
    assert synced["run"] == uri
    with open_run(uri) as run:
        run.refresh()
        database = f"sqlite:///{tmp_path / 'new.db'}"
        assert missing_and_extra(run.path, database, synced["mlflow_run_id"]) == (0, 0)
    database = f"sqlite:///{tmp_path / 'mlflow.db'}"
    words = ["--store", str(small_store), "--out", str(tmp_path / "report"), "--tracking-uri", database, "--json"]
    assert cli.run(["evaluate", "--checkpoint", uri, *words]) == 0
    assert json.loads(capfd.readouterr().out)["checkpoint"] == uri

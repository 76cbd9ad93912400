"""Training as users run it: real Ray Train, real MLflow on SQLite, small features."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from mlflow import MlflowClient

from ray_app import cli
from ray_app.cluster.resources import ClusterInfo, require_resources
from ray_app.commands.train.command import run_train
from ray_app.commands.train.shared_dataset import baselines_of
from ray_app.config.train import TrainConfig
from ray_app.errors import ConfigError, ResourceError, StoreError, TrainingError
from ray_app.runs.event_log import EventLog, entries
from ray_app.runs.run_dir import RunDir
from ray_app.store.checkpoint import load_checkpoint, load_training_state
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs
from ray_app.tracking.mlflow_logger import to_metrics
from ray_app.tracking.uri import tracking_uri

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def config(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainConfig]:
    """A small run's config, each in a folder of its own."""
    root = tmp_path_factory.mktemp("runs")
    uri = f"sqlite:///{root / 'mlflow.db'}"

    def make(name: str, **settings: Any) -> TrainConfig:
        small: dict[str, Any] = {
            **{"strategy": "lightweight", "num_epochs": 3, "hidden_dim": 16, "batch_size": 8},
            "tracking_uri": uri,
        }
        return TrainConfig(store=small_store, out=root / name, **(small | settings))

    return make


@pytest.fixture(scope="module")
def one_worker(config: Callable[..., TrainConfig]) -> tuple[TrainConfig, dict[str, Any]]:
    cfg = config("one")
    return cfg, run_train(cfg)


def test_a_run_leaves_a_checkpoint_an_event_log_and_a_tracked_run(
    one_worker: tuple[TrainConfig, dict[str, Any]],
) -> None:
    cfg, result = one_worker
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert {"checkpoint", "mlflow_run_id", "epochs", "val"} <= set(result)
    checkpoint = load_checkpoint(Path(result["checkpoint"]))
    assert checkpoint.provenance["run_key"] == json.loads((cfg.folder / "run.json").read_text())["key"]
    assert checkpoint.metrics["val"] == result["val"]
    lines = entries(cfg.folder)
    steps = [line for line in lines if line["kind"] == "step"]
    store = PairStore.open(cfg.store)
    split = split_pairs(store.index, cfg.split_config)
    assert len(steps) == result["steps"] == 3 * -(-len(split.train) // 8)
    losses = [line["train"]["loss"] for line in lines if line["kind"] == "epoch"]
    assert losses[-1] < losses[0]
    assert result["val"]["pairs"] == len(split.val)
    mean = torch.from_numpy(store.read_rows(split.train)[1].mean(axis=0) / 255).float()
    for name, counts in baselines_of(store, split, *store.read_rows(split.val), mean).fixed.items():
        assert result["val"]["baselines"][name] == counts.accept_rate()
    best = max(result["val"]["baselines"].values())
    assert result["val"]["lift"] == result["val"]["cosine_accept_rate"]["0.80"] - best


def test_mlflow_holds_every_point_of_the_event_log(one_worker: tuple[TrainConfig, dict[str, Any]]) -> None:
    cfg, result = one_worker
    client = MlflowClient(tracking_uri(cfg))
    run = client.get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert (result["tracking_uri"], result["artifacts"]) == (tracking_uri(cfg), run.info.artifact_uri)
    assert run.data.params["hidden_dim"] == "16"
    assert run.data.tags["dataset_fingerprint"] == PairStore.open(cfg.store).fingerprint
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in entries(cfg.folder):
        for point in to_metrics(line):
            expected.setdefault(point.key, []).append((point.step, point.value))
    assert set(run.data.metrics) == set(expected)
    for key, values in expected.items():
        found = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
        assert sorted(found) == sorted(values)
    names = {Path(item.path).name for item in client.list_artifacts(run.info.run_id, "model/checkpoint")}
    assert {"model.safetensors", "config.json", "MANIFEST.sha256"} <= names


def test_only_the_best_weights_and_the_last_state_stay(one_worker: tuple[TrainConfig, dict[str, Any]]) -> None:
    cfg, result = one_worker
    kept = {path.name for path in (cfg.folder / "checkpoints").iterdir()}
    assert kept == {Path(result["checkpoint"]).name, "epoch_0003"}
    assert [path.name for path in (cfg.folder / "training_state").iterdir()] == ["epoch_0003"]
    tensors, meta = load_training_state(cfg.folder / "training_state" / "epoch_0003")
    assert meta["counters"]["step"] == result["steps"]
    assert any(name.endswith("exp_avg_sq") for name in tensors)


def test_a_folder_in_use_is_refused_and_left_alone(one_worker: tuple[TrainConfig, dict[str, Any]]) -> None:
    cfg, _ = one_worker
    before = sorted(str(path) for path in cfg.folder.rglob("*"))
    with pytest.raises(StoreError, match="already holds something"):
        run_train(cfg)
    assert sorted(str(path) for path in cfg.folder.rglob("*")) == before


def test_two_workers_that_divide_the_features_equal_one(
    one_worker: tuple[TrainConfig, dict[str, Any]],
    config: Callable[..., TrainConfig],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Which is what they do by default. Sums in another order: weights agree to 1e-5, metrics to 1e-6."""
    alone, both = one_worker[1], run_train(config("features", num_workers=2))
    assert "2 workers divide the features of every pair" in capfd.readouterr().err
    assert both["parallelism"] == "feature"
    assert both["worker_counts"] == [{"workers": 2, "steps": alone["steps"]}]
    for key in ("pairs", "cosine_accept_rate", "baselines", "lift"):
        assert both["val"][key] == alone["val"][key], key
    assert both["val"]["cos_sim_mean"] == pytest.approx(alone["val"]["cos_sim_mean"], abs=1e-6)
    assert both["train"]["pairs"] == alone["train"]["pairs"]
    assert both["train"]["loss"] == pytest.approx(alone["train"]["loss"], rel=1e-6)
    a, b = (load_checkpoint(Path(r["checkpoint"])).adapter.state_dict() for r in (alone, both))
    for key in a:
        assert torch.allclose(a[key], b[key], atol=1e-5), key


@pytest.mark.slow
def test_three_workers_on_batches_of_eight_equal_one(
    one_worker: tuple[TrainConfig, dict[str, Any]], config: Callable[..., TrainConfig]
) -> None:
    """By pairs; with dropout, and validation within epochs, which changes nothing.

    Float32 sums in another order: weights agree to 1e-5, metrics to 1e-6.
    """
    alone = one_worker[1]
    cfg = config("three", num_workers=3, parallelism="data", val_every_steps=2)
    both = run_train(cfg)
    assert both["worker_counts"] == [{"workers": 3, "steps": alone["steps"]}]
    assert both["steps"] == alone["steps"]
    assert both["val"]["pairs"] == alone["val"]["pairs"]
    assert both["val"]["cosine_accept_rate"] == alone["val"]["cosine_accept_rate"]
    assert both["val"]["baselines"] == alone["val"]["baselines"]
    assert both["val"]["cos_sim_mean"] == pytest.approx(alone["val"]["cos_sim_mean"], abs=1e-6)
    a, b = (load_checkpoint(Path(r["checkpoint"])).adapter.state_dict() for r in (alone, both))
    for key in a:
        assert torch.allclose(a[key], b[key], atol=1e-5), key
    judged = [line for line in entries(cfg.folder) if line["kind"] == "validation"]
    within = [n for n in range(0, both["steps"], 2) if n == 0 or n % (both["steps"] // 3)]
    assert [line["global_step"] for line in judged] == within
    assert {line["val"]["pairs"] for line in judged} == {both["val"]["pairs"]}


@pytest.mark.slow
def test_contrasts_are_with_the_pairs_of_all_workers(config: Callable[..., TrainConfig]) -> None:
    """Batches of eight on three workers, and validation: a worker's own pairs alone would give another loss."""
    settings = {"contrastive_weight": 0.5, "num_epochs": 2, "parallelism": "data"}
    alone, three = (run_train(config(f"contrast-{n}", num_workers=n, **settings)) for n in ("1", "3"))
    assert three["val"]["loss"] == pytest.approx(alone["val"]["loss"], rel=1e-5)
    a, b = (load_checkpoint(Path(result["checkpoint"])).adapter.state_dict() for result in (alone, three))
    for key in a:
        assert torch.allclose(a[key], b[key], atol=1e-5), key


def kill_a_worker_after(run: Path, epoch: int, killed: list[int]) -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        if (run / "events.jsonl").is_file() and any(
            line["kind"] == "epoch" and line["epoch"] >= epoch for line in entries(run)
        ):
            for process in psutil.Process().children(recursive=True):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    return
        time.sleep(0.01)


LONG = {"num_epochs": 24, "early_stop_patience": 24}
"""Long enough that a kill after the first epochs comes before the end, on a busy machine too."""


@pytest.fixture(scope="module")
def uninterrupted(config: Callable[..., TrainConfig]) -> dict[str, Any]:
    return run_train(config("uninterrupted", **LONG))


def same_result(result: dict[str, Any], clean: dict[str, Any]) -> bool:
    return all(result[key] == clean[key] for key in ("model_sha256", "val", "steps", "epochs"))


def test_a_killed_worker_resumes_and_ends_with_the_same_bytes(
    config: Callable[..., TrainConfig], uninterrupted: dict[str, Any]
) -> None:
    cfg = config("killed", **LONG)
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker_after, args=(cfg.folder, 4, killed))
    killer.start()
    result = run_train(cfg)
    killer.join()
    assert killed, "no worker was found to kill"
    again, *_ = [line for line in entries(cfg.folder) if line["kind"] == "resumed"]
    assert again["epoch"] >= 4
    assert result["restarts"] == 1
    assert same_result(result, uninterrupted)


def in_a_process(words: list[str], run: Path, until_step: int, send: signal.Signals) -> int:
    """Runs `ray-app WORDS` with a cluster of its own; signals it after a step. SIGKILL goes to all its processes."""
    process = subprocess.Popen([sys.executable, "-m", "ray_app", *words], start_new_session=True)
    deadline = time.monotonic() + 400
    while True:
        output = entries(run) if (run / "events.jsonl").is_file() else []
        if any(line["kind"] == "step" and line["global_step"] >= until_step for line in output):
            break
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, f"step {until_step} was not reached"
        time.sleep(0.005)
    tree = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in tree if send == signal.SIGKILL else tree[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, send)
    return process.wait(timeout=400)


@pytest.mark.slow
def test_all_of_it_killed_then_asked_to_stop_then_resumed_the_run_ends_with_the_same_bytes(
    config: Callable[..., TrainConfig], uninterrupted: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """Within epochs: saved every fourth step, killed after step 30, asked to stop after step 100."""
    cfg = config("stopped", **LONG)
    words = f"train --store {cfg.store} --out {cfg.folder} --num-epochs 24 --early-stop-patience 24 --hidden-dim 16"
    words += " --strategy lightweight"
    words += f" --batch-size 8 --tracking-uri {cfg.tracking_uri} --checkpoint-every 4"
    resume = ["train", "--resume", str(cfg.folder)]
    assert in_a_process(words.split(), cfg.folder, 30, signal.SIGKILL) == -signal.SIGKILL
    assert in_a_process(resume, cfg.folder, 100, signal.SIGTERM) == 143
    stopped = [line["global_step"] for line in entries(cfg.folder) if line["kind"] == "stopped"]
    assert len(stopped) == 1
    assert stopped[0] >= 100
    capfd.readouterr()
    assert cli.run([*resume, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["resumed_from_step"] == stopped[0]
    assert same_result(result, uninterrupted)
    steps = [line["global_step"] for line in entries(cfg.folder) if line["kind"] == "step"]
    assert steps == list(range(1, result["steps"] + 1)), "each step is logged once"
    client = MlflowClient(tracking_uri(cfg))
    runs = client.search_runs([client.get_experiment_by_name(cfg.experiment).experiment_id])
    (tracked,) = [run for run in runs if run.data.tags["event_log"] == str(cfg.folder)]
    history = client.get_metric_history(tracked.info.run_id, "train/loss")
    assert [m.step for m in history] == steps
    assert tracked.info.status == "FINISHED"


@pytest.mark.slow
def test_another_number_of_workers_may_resume_and_the_cost_is_printed(
    config: Callable[..., TrainConfig],
    one_worker: tuple[TrainConfig, dict[str, Any]],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg, run = config("whole"), tmp_path / "moved"  # a run may be moved, too
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "keep_last", lambda *_: None)
        run_train(cfg)
    capfd.readouterr()
    shutil.copytree(cfg.folder, run)
    for place in ("checkpoints/epoch_0003", "training_state/epoch_0003"):
        shutil.rmtree(run / place)
    assert cli.run(["train", "--resume", str(run), "--num-workers", "1:2", "--json"]) == 0
    output = capfd.readouterr()
    assert "num_workers changed" in output.err
    assert "not be byte-identical" in output.err
    result, alone = json.loads(output.out), one_worker[1]
    assert result["workers"] == 2
    assert result["resumed_from_step"] == alone["steps"] * 2 // 3
    assert result["steps"] == alone["steps"]


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--learning-rate 0.5", "learning_rate was 0.001, is 0.5 now"),
        ("--num-epochs 9", "num_epochs was 3, is 9 now"),
    ],
)
def test_a_resume_with_another_config_is_refused_with_key_old_and_new(
    one_worker: tuple[TrainConfig, dict[str, Any]], flag: str, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["train", "--resume", str(one_worker[0].folder), *flag.split()]) == 2
    assert words in " ".join(capfd.readouterr().err.split())


def test_a_resume_of_what_is_no_run_is_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "--resume", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capfd.readouterr().err


@pytest.mark.slow
def test_a_shard_too_large_to_hold_is_streamed_in_bf16_too(config: Callable[..., TrainConfig]) -> None:
    streamed = {"shard_memory_gib": 1e-6}
    narrow = {"precision": "bf16", "bf16_gradients": True}
    result = run_train(config("streamed", num_workers=2, num_epochs=2, **streamed, **narrow))
    assert not result["in_memory"]
    assert result["train"]["pairs"] == result["split"]["train"]
    assert result["val"]["pairs"] == result["split"]["val"]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_and_says_where(config: Callable[..., TrainConfig]) -> None:
    cfg = config("burst", learning_rate=1e38)
    with pytest.raises(TrainingError, match=r"not finite .* at epoch \d+, step \d+.*checkpoint"):
        run_train(cfg)
    client = MlflowClient(tracking_uri(cfg))
    runs = client.search_runs([client.get_experiment_by_name(cfg.experiment).experiment_id])
    assert "FAILED" in {run.info.status for run in runs}


@pytest.mark.slow
def test_a_tracking_server_that_is_away_costs_neither_run_nor_point(
    config: Callable[..., TrainConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = config("untracked", tracking_uri="http://user:secret@127.0.0.1:9", num_epochs=2, mse_space="unit")
    result = run_train(cfg)
    assert result["mlflow_run_id"] is None
    assert not result["tracked"]
    assert sum(line["kind"] == "epoch" for line in entries(cfg.folder)) == 2
    output = capfd.readouterr().err
    assert output.count("does not answer") == 1
    assert "secret" not in output


def test_a_damaged_file_is_named_at_the_first_attempt(
    config: Callable[..., TrainConfig], small_store: Path, tmp_path: Path
) -> None:
    damaged = shutil.copytree(small_store, tmp_path / "store")
    part = next(damaged.glob("*.parquet"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1  # a page of a feature: the index is whole
    part.write_bytes(data)
    cfg = config("damaged").model_copy(update={"store": str(damaged)})
    with pytest.raises(TrainingError, match=rf"{part.name} is damaged: its SHA-256 differs.*no checkpoint yet"):
        run_train(cfg)
    kinds = [line["kind"] for line in entries(cfg.folder)]
    assert kinds == ["run_started", "workers_started", "failed", "run_ended"]


def test_a_file_store_is_refused(config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ConfigError, match="sqlite:///"):
        run_train(config("filestore", tracking_uri="mlruns"))


def test_no_gpu_is_said_before_anything_starts(config: Callable[..., TrainConfig]) -> None:
    cfg = config("gpu", use_gpu=True)
    with pytest.raises(ResourceError, match="needs 1 GPUs, the cluster has 0"):
        run_train(cfg)
    assert not cfg.folder.exists()


ROOM = ClusterInfo(cpus=2, gpus=0, memory_bytes=8 * 2**30, node_cpus=(2,))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"num_workers": 3}, "3 workers of 1 CPUs need 3 CPUs, the cluster has 2"),
        ({"num_workers": 2, "data_cpus": 1.0}, "and 1 to stream the data need 3 CPUs.*--cpus-per-worker 0.5"),
        ({"worker_bytes": 2.0**40}, "hold 1024.0 GiB .* the nodes have 8.0 GiB for workers: room for 0; .*feature"),
        ({"num_workers": 2, "worker_bytes": 5.0 * 2**30}, "each of 2 workers would hold 5.0 GiB .* room for 1"),
        ({"use_gpu": True}, "the cluster has 0"),
    ],
)
def test_a_request_beyond_the_cluster_is_refused_with_both_numbers(asked: dict[str, Any], words: str) -> None:
    fits: dict[str, Any] = {
        "num_workers": 1,
        "cpus_per_worker": 1.0,
        "use_gpu": False,
        "data_cpus": 0.0,
        "worker_bytes": 1.0,
    }
    require_resources(ROOM, **fits)
    with pytest.raises(ResourceError, match=words):
        require_resources(ROOM, **(fits | asked))


@pytest.mark.parametrize(
    ("nodes", "workers", "data_cpus", "share"),
    [
        ((2,), 1, 0, 2),
        ((2,), 2, 0, 1),
        ((2,), 2, 1, 0.5),
        ((2,), 3, 0, 0.66),
        ((2, 2, 2), 1, 0, 2),
        ((0, 8, 8), 3, 0, 4),
        ((4, 2), 2, 1, 2),
        ((1,), 1, 1, 0.1),
    ],
)
def test_a_worker_by_default_gets_what_one_node_can_give(
    nodes: tuple[float, ...], workers: int, data_cpus: float, share: float
) -> None:
    room = ClusterInfo(cpus=sum(nodes), gpus=0, memory_bytes=1.0, node_cpus=nodes)
    assert room.max_cpus_per_worker(workers, data_cpus) == share
    if share != 0.1:
        assert room.max_workers(share, data_cpus) >= workers


def test_a_line_cut_short_is_not_an_entry(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        log.write("run_started", name="x")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"kind": "ste')
    assert entries(tmp_path) == [{"kind": "run_started", "name": "x"}]
    with EventLog(tmp_path) as log:
        with pytest.raises(ValueError, match="not JSON compliant"):
            log.step(1, loss=float("nan"))
        log.write("resumed", epoch=1)
    assert [line["kind"] for line in entries(tmp_path)] == ["run_started", "resumed"]

"""Training whose number of workers follows the cluster: real raylets, one killed and one added on the way."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.cluster_utils import Cluster

from ray_app.commands.train.context import RunContext
from ray_app.commands.train.loop import WorkerContext, WorkerData, batches_in_memory, train_epochs
from ray_app.commands.train.summary import worker_counts
from ray_app.config.train import TrainConfig
from ray_app.data.batch_order import ShardedBatchOrder
from ray_app.data.pair_tensors import PairTensors
from ray_app.runs.event_log import EventLog, entries
from ray_app.runs.run_dir import RunDir
from ray_app.store.checkpoint import load_checkpoint
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs

SETTINGS: dict[str, Any] = {
    **{"strategy": "lightweight", "hidden_dim": 16, "batch_size": 8},
    **{"learning_rate": 1e-4, "early_stop_patience": 5_000},
}
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
SOON = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4"}
"""The head hears of a node that has gone after 2 s instead of 15."""


@pytest.fixture
def three_raylets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """One CPU each; the driver is at the first."""
    for name, value in SOON.items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(**NODE)
    yield cluster
    cluster.shutdown()


def alone(store: Path, out: Path, num_epochs: int) -> list[dict[str, Any]]:
    """The same training on one worker, without Ray: the epochs of its event log."""
    cfg = TrainConfig(store=str(store), out=out, num_epochs=num_epochs, **SETTINGS)
    opened = PairStore.open(store)
    split = split_pairs(opened.index, cfg.split_config)
    worker = WorkerContext(RunContext.of(cfg, opened), 0, 1, torch.device("cpu"))
    lanes = ShardedBatchOrder(len(split.train), cfg.batch_size, cfg.seed)
    train, val = (
        PairTensors(np.arange(len(rows)), *map(torch.tensor, opened.read_rows(rows)))
        for rows in (split.train, split.val)
    )
    pairs = WorkerData(lambda state: batches_in_memory(train, lanes, state, worker), True, val)
    out.mkdir()
    with EventLog(out) as log:
        train_epochs(worker, RunDir(out), pairs, log, {}, lambda *_: None)
    return of_kind(out, "epoch")


def of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    """The event log's lines of one kind so far."""
    return [line for line in entries(run) if line["kind"] == kind] if (run / "events.jsonl").is_file() else []


def wait_until(run: Path, process: "subprocess.Popen[str]", holds: Callable[[list[dict[str, Any]]], bool]) -> None:
    """Until the event log's steps say so."""
    deadline = time.monotonic() + 400
    while not holds(steps := of_kind(run, "step")):
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < deadline, steps[-1:]
        time.sleep(0.05)


@pytest.mark.parametrize("parallelism", ["data", "feature"])
def test_a_node_goes_and_one_comes_and_every_epoch_is_that_of_one_worker(
    three_raylets: Cluster, small_store: Path, tmp_path: Path, parallelism: str
) -> None:
    """Eight pairs a batch on three, two and three workers. Float32 sums in another order: 1e-5, weights 1e-4."""
    run = tmp_path / "elastic"
    words = (
        f"train --store {small_store} --out {run} --num-workers 1:3 --elastic-check-interval-s 1 --checkpoint-every 3"
    )
    words += f" --num-epochs 5000 --tracking-uri sqlite:///{tmp_path}/mlflow.db --address {three_raylets.address}"
    for name, value in {**SETTINGS, "parallelism": parallelism}.items():
        words += f" --{name.replace('_', '-')} {value}"
    process = subprocess.Popen([sys.executable, "-m", "ray_app", *words.split()], stderr=subprocess.PIPE, text=True)
    wait_until(run, process, lambda steps: len(steps) > 8)
    three_raylets.remove_node(next(iter(three_raylets.worker_nodes)), allow_graceful=False)
    wait_until(run, process, lambda steps: steps[-1]["workers"] == 2)
    three_raylets.add_node(**NODE)
    wait_until(run, process, lambda steps: len(steps) > 8 and {step["workers"] for step in steps[-8:]} == {3})
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=400)[1]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "on: 2 workers" in output
    steps, epochs = of_kind(run, "step"), of_kind(run, "epoch")
    assert [size["workers"] for size in worker_counts(steps)] == [3, 2, 3]
    assert [step["global_step"] for step in steps] == list(range(1, len(steps) + 1)), "each step is logged once"
    best = RunDir(run).best()
    assert best is not None
    expected = alone(small_store, tmp_path / "alone", int(best.name.removeprefix("epoch_")))
    for epoch, one in zip(epochs, expected, strict=False):
        assert epoch["epoch"] == one["epoch"]
        assert epoch["val"]["cos_sim_mean"] == pytest.approx(one["val"]["cos_sim_mean"], abs=1e-5)
        for part in ("train", "val"):
            assert epoch[part]["pairs"] == one[part]["pairs"]
            assert epoch[part]["loss"] == pytest.approx(one[part]["loss"], abs=1e-5)
    a, b = (load_checkpoint(path).adapter.state_dict() for path in (best, tmp_path / "alone/checkpoints" / best.name))
    for key in a:
        assert torch.allclose(a[key], b[key], atol=1e-4), key

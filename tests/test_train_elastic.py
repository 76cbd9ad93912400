"""Training whose number of workers follows the cluster: real raylets, one killed and one added on the way."""

import json
import os
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

from ray_app.config import TrainConfig
from ray_app.jobs.held import Held
from ray_app.jobs.journal import Journal, entries
from ray_app.jobs.lanes import Lanes
from ray_app.jobs.run_folder import RunFolder
from ray_app.jobs.train_loop import Pairs, Worker, held_batches, train_epochs
from ray_app.store.checkpoint import load_checkpoint
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs

SETTINGS: dict[str, Any] = {
    "num_epochs": 100,
    "early_stop_patience": 100,
    "hidden_dim": 16,
    "batch_size": 8,
    "learning_rate": 1e-4,
}


@pytest.fixture(scope="module")
def three_raylets() -> Iterator[Cluster]:
    """One CPU each; the driver is at the first."""
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(**node)
    yield cluster
    cluster.shutdown()


def alone(store: PairStore, out: Path) -> dict[str, Any]:
    """The same training on one worker, without Ray; its last epoch."""
    cfg = TrainConfig(store=store.root, out=out, **SETTINGS)
    split = split_pairs(store.index, cfg.split_config)
    worker = Worker(cfg, store, 0, 1, torch.device("cpu"))
    lanes = Lanes(len(split.train), cfg.batch_size, cfg.seed)
    train, val = (
        Held(np.arange(len(rows)), *map(torch.tensor, store.read_rows(rows))) for rows in (split.train, split.val)
    )
    pairs = Pairs(lambda state: held_batches(train, lanes, state, worker), True, val)
    out.mkdir()
    with Journal(out) as journal:
        train_epochs(worker, pairs, journal, {}, lambda *_: None)
    return [line for line in entries(out) if line["kind"] == "epoch"][-1]


def wait_until(run: Path, process: "subprocess.Popen[str]", holds: Callable[[list[dict[str, Any]]], bool]) -> None:
    """Until the journal's steps say so."""
    deadline = time.monotonic() + 90
    while True:
        lines = entries(run) if (run / "journal.jsonl").is_file() else []
        if holds([line for line in lines if line["kind"] == "step"]):
            return
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < deadline, lines[-1:]
        time.sleep(0.05)


def test_a_node_goes_and_one_comes_and_the_result_is_that_of_one_worker(
    three_raylets: Cluster, small_store: Path, tmp_path: Path
) -> None:
    """Eight pairs a batch on three, two and three workers. Float32 sums in another order: 1e-5."""
    run = tmp_path / "elastic"
    words = (
        f"train --store {small_store} --out {run} --num-workers 1:3 --resize-seconds 1 --checkpoint-every 3 --json"
    )
    words += f" --tracking-uri sqlite:///{tmp_path}/mlflow.db --address {three_raylets.address}"
    for name, value in SETTINGS.items():
        words += f" --{name.replace('_', '-')} {value}"
    process = subprocess.Popen(
        [sys.executable, "-m", "ray_app", *words.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.4"},
    )
    wait_until(run, process, lambda steps: len(steps) > 20)
    three_raylets.remove_node(next(iter(three_raylets.worker_nodes)), allow_graceful=False)
    wait_until(run, process, lambda steps: steps[-1]["workers"] == 2)
    three_raylets.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    printed, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    result = json.loads(printed)
    assert [size["workers"] for size in result["world_sizes"]] == [3, 2, 3]
    assert result["workers"] == 3
    assert "on: 2 workers" in told
    lines = entries(run)
    steps = [line["global_step"] for line in lines if line["kind"] == "step"]
    assert steps == list(range(1, result["steps"] + 1)), "each step is told once"
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == list(range(1, 101))
    last = [line for line in lines if line["kind"] == "epoch"][-1]
    store = PairStore.open(small_store)
    expected = alone(store, tmp_path / "alone")
    for part in ("train", "val"):
        assert last[part]["loss"] == pytest.approx(expected[part]["loss"], abs=1e-5)
    assert last["val"]["cos_sim_mean"] == pytest.approx(expected["val"]["cos_sim_mean"], abs=1e-5)
    a, b = (
        load_checkpoint(RunFolder(out).checkpoint("epoch_0100")).adapter.state_dict()
        for out in (run, tmp_path / "alone")
    )
    for key in a:
        assert torch.allclose(a[key], b[key], atol=1e-4), key

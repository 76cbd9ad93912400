"""Where a sweep's trials have their pairs from, and what they begin with: real Ray, small features."""

import json
from pathlib import Path
from typing import Any

import pytest
import ray
from sweeps import sweep_config, sweep_file, tune

from ray_app.commands.train.context import RunContext
from ray_app.commands.train.initialization import PairsInMemory, compute_init, load_init
from ray_app.commands.train.loop import WorkerContext
from ray_app.commands.train.shared_dataset import (
    part_bytes,
    share_dataset,
    shared_init,
    shared_pairs,
    shared_worker_data,
)
from ray_app.commands.tune.context import SweepContext
from ray_app.commands.tune.sweep_dir import SweepDir
from ray_app.config.base import SplitConfig
from ray_app.config.train import TrainConfig
from ray_app.errors import ConfigError
from ray_app.runs.event_log import entries
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs

pytestmark = pytest.mark.usefixtures("ray_cluster")

LOSSES = {"num_epochs": 2, "batch_size": 8, "dropout": 0.0, "rank": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweeps")


def losses(result: dict[str, Any]) -> list[list[float]]:
    """Validation loss of each epoch of each trial."""
    folder = SweepDir(Path(result["sweep"]))
    runs = [folder.run(trial["id"]).path for trial in result["trials"]]
    return [[line["val"]["loss"] for line in entries(run) if line["kind"] == "epoch"] for run in runs]


def test_pairs_beyond_shared_memory_are_streamed_by_trials_that_have_all_cpus(
    small_store: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a second objective, latency, and a strategy that wants means and subspaces of what is streamed."""
    store = PairStore.open(small_store)
    split = split_pairs(store.index, SplitConfig())
    memory = ray.cluster_resources()["object_store_memory"]
    monkeypatch.setattr("ray_app.commands.train.shared_dataset.SHARE", (part_bytes(store, split.val) + 1) / memory)
    space = {"strategy": ["lightweight", "lowrank"], "hidden_dim": [8]}
    lines = {"space": space, "base": LOSSES, "secondary_objective": "latency_ms"}
    result = tune(sweep_file(root, small_store, "streamed", **lines))
    assert "every trial streams it from the store" in capfd.readouterr().err
    assert [(trial["status"], trial["reason"]) for trial in result["trials"]] == [("finished", None)] * 2
    assert [len(each) for each in losses(result)] == [2, 2]
    assert {trial["steps"] for trial in result["trials"]} == {2 * -(-len(split.train) // 8)}
    assert all(0 < trial["latency_ms"] < 1000 for trial in result["trials"])
    assert result["pareto_front"]


def lowrank_sweep(small_store: Path, tmp_path: Path) -> SweepContext:
    fixed = {"strategy": "lowrank", "batch_size": 8}
    file = sweep_file(tmp_path, small_store, "lowrank", base=fixed, space={"rank": [2, 4, 500]})
    return SweepContext.open(sweep_config(file))


def test_what_trials_begin_with_is_found_once_and_seen_without_a_copy(small_store: Path, tmp_path: Path) -> None:
    """Of the largest rank that can be had; others are its first directions. A run alone finds the same."""
    sweep = lowrank_sweep(small_store, tmp_path)
    store = PairStore.open(small_store)
    part = share_dataset(store, split_pairs(store.index, sweep.cfg.split_config), 2**30)
    placed = sweep.share_inits({"all": part}, tmp_path / "starts")["all"]
    out = str(tmp_path / "run")
    cfg = TrainConfig(store=str(small_store), out=out, strategy="lowrank", rank=4)
    found = shared_init(placed, RunContext.of(cfg, store))
    assert found is not None
    assert part.train
    context = RunContext.of(cfg, store)
    compute_init(context, PairsInMemory(store, shared_pairs(part.train), shared_pairs(part.val)))
    alone = load_init(context)
    assert set(found) == set(alone)
    assert all(found[name].equal(alone[name]) for name in alone)
    pairs = shared_worker_data(placed, WorkerContext(context, 0, 1, found["target_mean"].device, found))
    assert pairs.validation is not None
    assert pairs.validation.target_BD.data_ptr() == shared_pairs(placed.val).target_BD.data_ptr()
    again = shared_init(placed, RunContext.of(cfg, store))
    assert again is not None
    assert again["event_basis"].data_ptr() == found["event_basis"].data_ptr(), "the very bytes of shared memory"
    two = shared_init(placed, RunContext.of(cfg.model_copy(update={"rank": 2}), store))
    assert two is not None
    assert two["event_basis"].equal(found["event_basis"][:, :2])
    with pytest.raises(ConfigError, match=r"--rank \(500\)"):
        shared_init(placed, RunContext.of(cfg.model_copy(update={"rank": 500}), store))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "starts").rglob("*")}
    sweep.share_inits({"all": part}, tmp_path / "starts")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "starts").rglob("*")} == before


def test_a_sweep_over_ranks_finds_subspaces_once_and_a_rank_that_pairs_do_not_span_fails_by_itself(
    small_store: Path, root: Path
) -> None:
    """With fewer parameters as the second objective."""
    fixed = {key: value for key, value in LOSSES.items() if key != "rank"} | {"strategy": "lowrank", "hidden_dim": 8}
    lines = {"space": {"rank": [4, 500]}, "base": fixed, "secondary_objective": "parameters"}
    result = tune(sweep_file(root, small_store, "both", **lines))
    finished, failed = result["trials"]
    assert (finished["status"], failed["status"]) == ("finished", "failed")
    assert failed["reason"].startswith("twice the same: ConfigError: --rank (500)")
    folder = SweepDir(Path(result["sweep"]))
    assert not list(folder.path.glob("trials/*/init")), "no trial found its own"
    assert result["pareto_front"] == [finished["id"]]
    assert json.loads((folder.path / "sweep.json").read_text())["config"]["secondary_objective"] == "parameters"

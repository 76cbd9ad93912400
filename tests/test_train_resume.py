"""Going on after a worker was killed, at each point of a save; no Ray is needed to see it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_app.config import TrainConfig
from ray_app.errors import TrainingError
from ray_app.jobs.journal import Journal, entries
from ray_app.jobs.run_folder import RunFolder
from ray_app.jobs.shards import Held
from ray_app.jobs.train_loop import TrainState, Worker, resume_or_init, resumed, validate
from ray_app.store.checkpoint import save_training_state
from ray_app.store.pair_store import PairStore

CPU = torch.device("cpu")
Start = Callable[[], TrainState]


@pytest.fixture
def cfg(small_store: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(store=small_store, out=tmp_path / "run", hidden_dim=4, strategy="bottleneck")


@pytest.fixture
def store(cfg: TrainConfig) -> PairStore:
    return PairStore.open(cfg.store)


@pytest.fixture
def start(cfg: TrainConfig, store: PairStore) -> Start:
    return lambda: resume_or_init(cfg, store, RunFolder(cfg.out), CPU)


def metrics(state: TrainState) -> dict[str, Any]:
    return {"epoch": state.epoch, "train": {"loss": 1.0}, "val": {"loss": state.best_loss}}


def save(cfg: TrainConfig, store: PairStore, state: TrainState) -> None:
    RunFolder(cfg.out).save(
        state.epoch,
        state.objective.adapter,
        features=store.manifest.features,
        metrics=metrics(state),
        provenance={},
        tensors=state.tensors(),
        meta=state.meta(),
        best_epoch=state.best_epoch,
    )


def test_killed_before_the_weights_it_goes_on_from_the_epoch_before(
    cfg: TrainConfig, store: PairStore, start: Start
) -> None:
    run, state = RunFolder(cfg.out), start()
    assert state.epoch == 0
    state.end_epoch(2.0)
    save(cfg, store, state)
    state.end_epoch(1.0)
    save_training_state(run.state(2), state.tensors(), state.meta())
    state = start()
    assert (state.epoch, state.best_loss) == (1, 2.0)
    state.end_epoch(1.0)
    save(cfg, store, state)
    state = start()
    assert (state.epoch, state.best_loss) == (2, 1.0)


def test_killed_before_it_is_told_an_epoch_is_told_by_the_next_start_and_only_once(
    cfg: TrainConfig, store: PairStore, start: Start
) -> None:
    run, state = RunFolder(cfg.out), start()
    for loss in (2.0, 1.0):
        state.end_epoch(loss)
        save(cfg, store, state)
    (cfg.out / "best.json").write_text(json.dumps({"checkpoint": "checkpoints/epoch_0001", "epoch": 1}))
    for _ in range(2):
        with Journal(cfg.out) as journal:
            resumed(journal, run, start())
    assert run.best() == run.checkpoint(2)
    lines = entries(cfg.out)
    assert [(line["kind"], line["epoch"]) for line in lines] == [("resume", 2), ("epoch", 2), ("resume", 2)]
    assert {key: lines[1][key] for key in ("epoch", "train", "val")} == metrics(state)


def test_a_damaged_state_is_never_gone_on_from(cfg: TrainConfig, store: PairStore, start: Start) -> None:
    state = start()
    state.end_epoch(2.0)
    save(cfg, store, state)
    path = RunFolder(cfg.out).state(1) / "training_state.json"
    path.write_text(path.read_text().replace("2.0", "1.0"))
    assert start().epoch == 0


def test_a_validation_loss_that_is_not_finite_ends_training(cfg: TrainConfig, store: PairStore, start: Start) -> None:
    state = start()
    with torch.no_grad():
        state.objective.adapter.output.bias[0] = float("nan")
    pairs = torch.ones(3, store.feature("event").width, dtype=torch.uint8)
    held = Held(np.arange(3), pairs, pairs)
    with pytest.raises(TrainingError, match=r"validation loss is not finite \(nan\) at epoch 1, step 6"):
        validate(state.objective, held, Worker(cfg, store, 0, 1, CPU), "epoch 1, step 6")

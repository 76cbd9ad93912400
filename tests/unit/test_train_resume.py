"""Resuming after a worker was killed, at each point of a save; no Ray is needed to see it."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from ray_app.commands.train import loop as train_loop
from ray_app.commands.train.command import stop_when_terminated
from ray_app.commands.train.context import RunContext
from ray_app.commands.train.launch import with_resume_hint
from ray_app.commands.train.loop import (
    WorkerContext,
    WorkerData,
    batches_in_memory,
    sleep_before_retry,
    train_epoch,
    validate,
)
from ray_app.commands.train.state import Checkpointer, TrainState, broadcast_resume_point, resume_or_init
from ray_app.config.train import TrainConfig
from ray_app.data.batch_order import ShardedBatchOrder
from ray_app.data.pair_tensors import PairTensors
from ray_app.errors import RunInterrupted, StoreError, TrainingError
from ray_app.runs.event_log import EventLog, entries
from ray_app.runs.run_dir import RunDir, checkpoint_name
from ray_app.store.checkpoint import save_training_state
from ray_app.store.pair_store import PairStore
from ray_app.tracking.mlflow_logger import to_metrics

CPU = torch.device("cpu")
Start = Callable[[], TrainState]
VAL = {"loss": 1.0}


@pytest.fixture
def cfg(small_store: Path, tmp_path: Path) -> TrainConfig:
    (tmp_path / "run").mkdir()
    return TrainConfig(store=small_store, out=tmp_path / "run", hidden_dim=4, strategy="lightweight", batch_size=4)


@pytest.fixture
def store(cfg: TrainConfig) -> PairStore:
    return PairStore.open(cfg.store)


@pytest.fixture
def start(cfg: TrainConfig, store: PairStore) -> Start:
    return lambda: resume_or_init(RunContext.of(cfg, store), RunDir(cfg.folder).latest_resumable(), CPU)


def keeper(cfg: TrainConfig, store: PairStore, log: EventLog | None) -> Checkpointer:
    return Checkpointer(RunDir(cfg.folder), store, log, {})


def end_epoch(cfg: TrainConfig, store: PairStore, state: TrainState, val_loss: float) -> None:
    state.step += 7
    state.end_epoch(val_loss)
    with EventLog(cfg.folder) as log:
        keeper(cfg, store, log).end_of_epoch(state, {"loss": 1.0}, {"loss": val_loss})


def test_killed_before_the_weights_it_resumes_from_the_epoch_before(
    cfg: TrainConfig, store: PairStore, start: Start
) -> None:
    run, state = RunDir(cfg.folder), start()
    assert state.epoch == 0
    end_epoch(cfg, store, state, 2.0)
    state.end_epoch(1.0)
    save_training_state(run.state(checkpoint_name(2)), state.tensors(), state.meta())
    state = start()
    assert (state.epoch, state.best_loss) == (1, 2.0)
    end_epoch(cfg, store, state, 1.0)
    state = start()
    assert (state.epoch, state.best_loss) == (2, 1.0)


def test_killed_before_it_is_logged_an_epoch_is_logged_by_the_next_start_and_only_once(
    cfg: TrainConfig, store: PairStore, start: Start
) -> None:
    run, state = RunDir(cfg.folder), start()
    for loss in (2.0, 1.0):
        end_epoch(cfg, store, state, loss)
    (cfg.folder / "best.json").write_text(json.dumps({"checkpoint": "checkpoints/epoch_0001", "epoch": 1}))
    log_file = cfg.folder / "events.jsonl"
    log_file.write_bytes(b"".join(log_file.read_bytes().splitlines(keepends=True)[:-1]))  # killed before it
    for _ in range(2):
        with EventLog(cfg.folder) as log:
            keeper(cfg, store, log).begin(start(), 1)
    assert run.best() == run.checkpoint(checkpoint_name(2))
    lines = entries(cfg.folder)
    printed = [(line["kind"], line["epoch"]) for line in lines]
    assert printed == [("epoch", 1), ("resumed", 2), ("epoch", 2), ("resumed", 2)]
    assert lines[2]["val"] == {"loss": 1.0}


def test_a_damaged_state_is_set_aside_and_the_place_before_is_resumed_from(
    cfg: TrainConfig, store: PairStore, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    state = start()
    for loss in (3.0, 2.0, 1.0):
        end_epoch(cfg, store, state, loss)
    path = RunDir(cfg.folder).state(checkpoint_name(3)) / "training_state.json"
    path.write_text(path.read_text().replace("1.0", "4.0"))
    assert start().epoch == 2
    assert str(path) in capsys.readouterr().err
    assert RunDir(cfg.folder).checkpoint(checkpoint_name(3)).is_dir(), "its weights hold, and may be the best"
    (aside,) = (cfg.folder / "quarantine" / "training_state").iterdir()
    assert (aside / "training_state.json").is_file()
    assert start().epoch == 2, "a second start finds the same"


def test_the_newest_two_places_and_the_best_at_each_stay(cfg: TrainConfig, store: PairStore, start: Start) -> None:
    state = start()
    kept = []
    for loss in (2.0, 4.0, 3.0, 1.0, 5.0):
        end_epoch(cfg, store, state, loss)
        kept.append(
            [{p.name for p in (cfg.folder / folder).iterdir()} for folder in ("checkpoints", "training_state")]
        )
    assert kept[2:] == [
        [{checkpoint_name(1), checkpoint_name(2), checkpoint_name(3)}, {checkpoint_name(2), checkpoint_name(3)}],
        [
            {checkpoint_name(1), checkpoint_name(3), checkpoint_name(4)},
            {checkpoint_name(3), checkpoint_name(4)},
        ],  # the first was the best at the third
        [{checkpoint_name(4), checkpoint_name(5)}, {checkpoint_name(4), checkpoint_name(5)}],
    ]


def test_where_the_newest_weights_are_damaged_and_were_the_best_the_best_before_is_back(
    cfg: TrainConfig, store: PairStore, start: Start
) -> None:
    state = start()
    for loss in (2.0, 4.0, 3.0, 1.0):
        end_epoch(cfg, store, state, loss)
    run = RunDir(cfg.folder)
    (run.checkpoint(checkpoint_name(4)) / "model.safetensors").write_bytes(b"")
    state = start()
    assert (state.epoch, state.best_epoch) == (3, 1)
    with EventLog(cfg.folder) as log:
        keeper(cfg, store, log).begin(state, 1)
    assert run.best() == run.checkpoint(checkpoint_name(1))
    assert run.best().is_dir()
    end_epoch(cfg, store, state, 1.0)
    assert run.best() == run.checkpoint(checkpoint_name(4))


def test_places_are_in_order_by_name_and_the_first_worker_decides(cfg: TrainConfig) -> None:
    names = [
        checkpoint_name(0, 99),
        checkpoint_name(1),
        checkpoint_name(1, 130),
        checkpoint_name(1, 1300),
        checkpoint_name(2),
        checkpoint_name(10, 1),
    ]
    assert names == sorted(names)
    assert broadcast_resume_point(RunDir(cfg.folder), 0, 1, CPU) is None


def test_stopped_and_resumed_within_an_epoch_every_pair_comes_once_and_the_weights_are_the_same_bytes(
    cfg: TrainConfig, store: PairStore, start: Start
) -> None:
    """Saved after every second step, killed after the fifth of thirteen, asked to stop after the ninth.

    Validated within the epoch, which the undisturbed one is not.
    """
    event, target = (torch.tensor(side) for side in store.read_rows(np.arange(50)))
    held = PairTensors(np.arange(50), event, target)
    lanes = ShardedBatchOrder(50, cfg.batch_size, cfg.seed)
    often = cfg.model_copy(update={"checkpoint_every": 2, "val_every_steps": 3})
    worker = WorkerContext(RunContext.of(often, store), 0, 1, CPU)
    seen: list[int] = []

    def run(state: TrainState, keep: Checkpointer, die_after: int = 99, stop_after: int = 99) -> bool:
        def batches() -> Any:
            for batch, *pairs in batches_in_memory(held, lanes, state, worker):
                if state.step == die_after:
                    raise KeyboardInterrupt
                if state.step == stop_after - 1:
                    RunDir(cfg.folder).stop_file.touch()
                seen.extend(batch.positions.tolist())
                yield batch, *pairs

        data = WorkerData(lambda _: batches(), True, held if keep.log else None)
        return train_epoch(state.objective, state, batches(), worker, keep, data)

    whole = start()
    at_start = validate(whole.objective, held, worker, "the start")
    assert run(whole, keeper(cfg, store, None))
    assert sorted(seen) == list(range(50))
    first = list(seen)

    seen.clear()
    with EventLog(cfg.folder) as log:
        with pytest.raises(KeyboardInterrupt):
            run(start(), keeper(cfg, store, log), die_after=5)
        del seen[4 * cfg.batch_size :]  # what was done after the save is done again
        state = start()
        assert state.checkpoint_name == checkpoint_name(0, 4)
        assert not run(state, keeper(cfg, store, log), stop_after=9)
        RunDir(cfg.folder).stop_file.unlink()
        state = start()
        assert state.checkpoint_name == checkpoint_name(0, 9)
        assert run(state, keeper(cfg, store, log))
    assert seen == first
    assert state.sums.pairs == 50
    assert (state.sums.loss, state.sums.cos_sim) == (whole.sums.loss, whole.sums.cos_sim)
    for key, value in whole.objective.state_dict().items():
        assert torch.equal(value, state.objective.state_dict()[key]), key
    for key, value in whole.tensors().items():
        assert torch.equal(value, state.tensors()[key]), key
    steps = [line["global_step"] for line in entries(cfg.folder) if line["kind"] == "step"]
    assert steps == list(range(1, 14)), "each step is logged once"
    validations = [line for line in entries(cfg.folder) if line["kind"] == "validation"]
    assert [line["global_step"] for line in validations] == [0, 3, 6, 9, 12], "and each validation"
    assert validations[0]["val"] == at_start
    assert validations[-1]["val"]["loss"] < at_start["loss"]
    assert {point.key for point in to_metrics(validations[0])} >= {
        "validation/val/loss",
        "validation/val/cos_sim_mean",
    }


def test_another_attempt_waits_twice_as_long(cfg: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(train_loop.time, "sleep", waited.append)
    with EventLog(cfg.folder) as log:
        for _ in range(2):
            log.write("run_started")
            for _ in range(7):
                sleep_before_retry(RunDir(cfg.folder))
                log.write("workers_started")
    assert waited == [1, 2, 4, 8, 16, 30] * 2


def test_a_run_has_one_driver_and_its_event_log_one_writer(cfg: TrainConfig) -> None:
    run = RunDir(cfg.folder)
    (cfg.folder / "run.json").write_text("{}")
    with run.exclusive(), pytest.raises(StoreError, match="driven by another process"), run.exclusive():
        pass
    with EventLog(cfg.folder), pytest.raises(StoreError, match="by another process"):
        EventLog(cfg.folder, patience_s=0.1)


@pytest.mark.parametrize("answer", [KeyboardInterrupt, SystemExit])
def test_after_ctrl_c_a_run_says_how_to_resume(cfg: TrainConfig, answer: type[BaseException]) -> None:
    """Ray Train puts a handler of its own in place, which ends the process, and leaves it there."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def leave(*_: Any) -> None:
        raise answer

    def interrupted() -> None:
        with stop_when_terminated(RunDir(cfg.folder)):
            signal.signal(signal.SIGINT, leave)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(RunInterrupted, match=r"resume with: ray-app train --resume") as caught:
        interrupted()
    assert caught.value.exit_code == 130
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_disk_that_fails_a_worker_is_named_with_the_resume_command_and_a_defect_of_ours_is_not(
    cfg: TrainConfig,
) -> None:
    run = RunDir(cfg.folder)

    def ended_by(cause: Exception) -> WorkerGroupError:
        return WorkerGroupError("Training failed", {0: UserExceptionWithTraceback(cause, "Traceback …")})

    full = StoreError("best.json cannot be written: No space left on device; Make room for it.")
    hint = r"Make room for it\. What was saved is whole; resume with: ray-app train"
    for error in (ended_by(full), full):
        with pytest.raises(StoreError, match=hint), with_resume_hint(run):
            raise error
    with pytest.raises(WorkerGroupError), with_resume_hint(run):
        raise ended_by(ValueError("ours"))
    killed = (
        r"processes died \(The actor .*\); a machine whose memory is full kills them.* resume with: ray-app train"
    )
    with pytest.raises(TrainingError, match=killed), with_resume_hint(run):
        raise RayActorError
    with (
        pytest.raises(RunInterrupted, match=r"What was saved is whole; resume with: ray-app train"),
        with_resume_hint(run),
    ):
        raise KeyboardInterrupt


def test_a_validation_loss_that_is_not_finite_ends_training(cfg: TrainConfig, store: PairStore, start: Start) -> None:
    state = start()
    with torch.no_grad():
        state.objective.adapter.output.bias[0] = float("nan")
    pairs = torch.ones(3, store.feature("event").width, dtype=torch.uint8)
    held = PairTensors(np.arange(3), pairs, pairs)
    with pytest.raises(TrainingError, match=r"validation loss is not finite \(nan\) at epoch 1, step 6"):
        validate(state.objective, held, WorkerContext(RunContext.of(cfg, store), 0, 1, CPU), "epoch 1, step 6")

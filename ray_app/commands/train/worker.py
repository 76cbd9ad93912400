"""What each Ray Train worker does: its pairs out of Ray Data, the training loop, a word to the controller."""

import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import ray.train
import torch
from ray.train.torch import get_device

from ray_app.commands.train import shared_dataset as sweep_data
from ray_app.commands.train.initialization import INIT
from ray_app.commands.train.loop import (
    Batches,
    WorkerContext,
    WorkerData,
    held_batches,
    sleep_before_retry,
    train_epochs,
)
from ray_app.commands.train.shared_dataset import SharedDataset
from ray_app.commands.train.state import TrainState, training_split
from ray_app.config.train import TrainConfig
from ray_app.data.batch_order import ShardedBatchOrder
from ray_app.data.pairs_dataset import iter_batches, load_pair_tensors
from ray_app.runs.event_log import require_latest_driver
from ray_app.runs.run_dir import open_run
from ray_app.store.pair_store import PairStore


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """One worker's run. `config`: `run` (where it lies), `started` (its driver, in Unix time), `train` (a
    TrainConfig), `held`, `threads`, `provenance`, and `placed`, its pairs in shared memory, or None."""
    cfg = TrainConfig.model_validate(config["train"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config["threads"])
    store = PairStore.open(cfg.store, cfg.durations)
    with open_run(config["run"]) as run, run.event_log() if rank == 0 else nullcontext() as log:
        cfg = cfg.at(run.path)
        placed: SharedDataset | None = config["placed"]
        start = sweep_data.start_of(placed, cfg) if placed else None
        worker = WorkerContext(cfg, store, rank, world, get_device(), start)
        if log:
            require_latest_driver(run.path, config["started"])
            sleep_before_retry(run)
            log.write("workers_started", workers=world, time=time.time())
        run.download(INIT)
        pairs = sweep_data.pairs_of(placed, worker) if placed else pairs_of(worker, held=config["held"])
        train_epochs(worker, run, pairs, log, config["provenance"], report)


def pairs_of(worker: WorkerContext, *, held: bool) -> WorkerData:
    """This worker's part of both data sets: held in memory, or its training part streamed anew each epoch."""
    cfg, store, rank, world = worker.cfg, worker.store, worker.rank, worker.world
    split = training_split(cfg, store)
    lanes = ShardedBatchOrder(len(split.train), cfg.batch_size, cfg.seed)
    rows = np.arange(rank, len(split.val), world)
    shard = ray.train.get_dataset_shard("train")
    mine = load_pair_tensors(shard, store, split.train, lanes.held(rank, world)).on(worker.device) if held else None

    def rest_of_epoch(state: TrainState) -> Batches:
        if mine:
            return held_batches(mine, lanes, state, worker)
        return iter_batches(shard, store, cfg.seed, state.epoch, rank, world, cfg.batch_size)

    validation = None
    if len(split.val):
        validation = load_pair_tensors(ray.train.get_dataset_shard("val"), store, split.val, rows).on(worker.device)
    return WorkerData(rest_of_epoch, held, validation)


def report(state: TrainState, val: dict[str, Any]) -> None:
    """To Ray Train's controller; every worker does so equally often."""
    ray.train.report({"epoch": state.epoch, "val_loss": val.get("loss")})

"""A Ray Train worker: takes its pairs from Ray Data or shared memory, trains, and reports to the controller."""

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray.train
import torch
from ray.train.torch import get_device

from ray_app.commands.train.context import INIT, RunContext
from ray_app.commands.train.loop import (
    BaselineContext,
    Batches,
    WorkerContext,
    WorkerData,
    all_reduce_counts,
    batches_in_memory,
    sleep_before_retry,
    train_epochs,
)
from ray_app.commands.train.parallelism import join
from ray_app.commands.train.shared_dataset import (
    SharedDataset,
    count_fixed_baselines,
    shared_init,
    shared_worker_data,
)
from ray_app.commands.train.state import TrainState
from ray_app.core.evaluation import Baselines, derangement
from ray_app.data.batch_order import ShardedBatchOrder
from ray_app.data.pair_tensors import PairTensors
from ray_app.data.pairs_dataset import iter_batches, load_pair_tensors
from ray_app.runs.run_dir import open_run


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """Message from a driver to each of its workers. Ray shows its text to all users of the cluster."""

    run: str
    """Path or URI of the run."""
    context: RunContext = field(repr=False)
    """Settings, data and adapter of the run."""
    started: float
    """When the driver started, in Unix time."""
    in_memory: bool
    """The worker holds its training pairs in memory; otherwise it streams them each epoch."""
    threads: int
    """Threads that the worker computes with."""
    provenance: dict[str, Any] = field(repr=False)
    """Written into each checkpoint."""
    shared: SharedDataset | None = field(default=None, repr=False)
    """Pairs in shared memory, for the trials of a sweep."""
    mean_target_D: torch.Tensor | None = field(default=None, repr=False)
    """Mean training target, a baseline; None where pairs are shared, nothing is validated, or targets are tokens."""


def train_loop_per_worker(config: dict[str, WorkerSpec]) -> None:
    """Run one worker. `config`: the WorkerSpec as `spec`."""
    spec = config["spec"]
    train_context = ray.train.get_context()
    rank, world = train_context.get_world_rank(), train_context.get_world_size()
    torch.set_num_threads(spec.threads)
    with open_run(spec.run) as run, run.event_log(spec.started) if rank == 0 else nullcontext() as log:
        context = spec.context.at(run.path)
        init = shared_init(spec.shared, context) if spec.shared else None
        device, of_node = get_device(), train_context.get_local_world_size()
        member = join(context.division, rank, world, of_node, device)
        worker = WorkerContext(context, rank, world, device, init, member)
        if log:
            sleep_before_retry(run)
            log.write("workers_started", workers=world, time=time.time())
        run.download(INIT)
        data = shared_worker_data(spec.shared, worker) if spec.shared else _data_of_this_worker(worker, spec)
        train_epochs(worker, run, data, log, spec.provenance, _report)


def _data_of_this_worker(worker: WorkerContext, spec: WorkerSpec) -> WorkerData:
    """Take a worker's part of both data sets; its training part in memory, or streamed again each epoch."""
    cfg, store, split = worker.cfg, worker.store, worker.context.split
    rank, world = worker.pair_rank, worker.pair_world
    train, shard = None, ray.train.get_dataset_shard("train")
    order = ShardedBatchOrder(len(split.train), cfg.batch_size, cfg.seed)
    if spec.in_memory:
        train = load_pair_tensors(shard, store, split.train, order.held(rank, world), worker.columns)
        train = train.on(worker.device)

    def rest_of_epoch(state: TrainState) -> Batches:
        if train:
            return batches_in_memory(train, order, state, worker)
        return iter_batches(shard, store, cfg.seed, state.epoch, rank, world, cfg.batch_size)

    if not len(split.val):
        return WorkerData(rest_of_epoch, spec.in_memory, None)
    return WorkerData(rest_of_epoch, spec.in_memory, *_validation_of_this_worker(worker, spec.mean_target_D))


def _validation_of_this_worker(
    worker: WorkerContext, mean_target_D: torch.Tensor | None
) -> tuple[PairTensors, BaselineContext | None]:
    """Take a worker's validation pairs, and the baselines of all of them; the same for any number of workers.

    Without a mean target there are no baselines.
    """
    store, split = worker.store, worker.context.split
    rows = np.arange(worker.pair_rank, len(split.val), worker.pair_world)
    others = derangement(store.index.sequence[split.val].tolist(), seed=0)
    shard = ray.train.get_dataset_shard("val")
    held = load_pair_tensors(shard, store, split.val, np.union1d(rows, others[rows]), worker.columns)
    val = held if worker.pair_world == 1 else PairTensors(rows, *held.take(rows))
    if mean_target_D is None:
        return val.on(worker.device), None
    whole = val
    if worker.part.count > 1:  # baselines compare whole features: each worker takes a share of the pairs for a moment
        whole = load_pair_tensors(shard, store, split.val, np.arange(worker.rank, len(split.val), worker.world))
    own = count_fixed_baselines(store, whole.event_BE.numpy(), whole.target_BD.numpy(), mean_target_D)
    fixed = {name: all_reduce_counts(worker, counts) for name, counts in own.items()}
    held = held.on(worker.device)
    val = held if worker.pair_world == 1 else val.on(worker.device)
    return val, BaselineContext(Baselines(fixed, others), held)


def _report(state: TrainState, val: dict[str, Any]) -> None:
    """Report to Ray Train's controller; every worker does so equally often."""
    ray.train.report({"epoch": state.epoch, "val_loss": val.get("loss")})

"""A Ray Train worker: takes its pairs from Ray Data, shared memory or the store, trains, and reports."""

import importlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
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
from ray_app.config.train import LanguageModelTrainConfig
from ray_app.core.evaluation import Baselines, TrainingMeans, derangement
from ray_app.core.metrics import AlignmentCounts
from ray_app.data.batch_order import ShardedBatchOrder
from ray_app.data.pair_blocks import Block, load_pair_tensors, read_blocks
from ray_app.data.pair_tensors import PairTensors
from ray_app.data.pairs_dataset import dataset_blocks, iter_batches
from ray_app.errors import InputError, StoreError
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
    reads_store: bool = False
    """Workers read their pairs from the store themselves; otherwise these come through Ray Data."""
    mean_target_D: torch.Tensor | None = field(default=None, repr=False)
    """Mean training target, a baseline; None where there are no baselines, or a single worker computes it."""


def train_loop_per_worker(config: dict[str, ray.ObjectRef]) -> None:
    """Run one worker. `config`: a reference to its WorkerSpec as `spec`, which Ray Train's controller never reads."""
    # torch imports its compiler at the first optimizer step, which takes a core 1.3 s; reading leaves it the time.
    threading.Thread(target=importlib.import_module, args=("torch._dynamo",), daemon=True).start()
    spec: WorkerSpec = ray.get(config["spec"])
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
        try:
            data = shared_worker_data(spec.shared, worker) if spec.shared else _data_of_this_worker(worker, spec)
        except (StoreError, InputError) as error:
            if not (log and world == 1 and spec.reads_store):
                raise
            log.write("failed", error=str(error), time=time.time())  # another attempt would fail like this one
            return
        train_epochs(worker, run, data, log, spec.provenance, _report)


def _data_of_this_worker(worker: WorkerContext, spec: WorkerSpec) -> WorkerData:
    """Take a worker's part of both data sets; its training part in memory, or streamed again each epoch."""
    cfg, store, split = worker.cfg, worker.store, worker.context.split
    rank, world = worker.pair_rank, worker.pair_world
    rest_of_epoch: Callable[[TrainState], Batches]
    mean_target_D = spec.mean_target_D
    if spec.in_memory:
        order = ShardedBatchOrder(len(split.train), cfg.batch_size, cfg.seed)
        blocks, wanted = _blocks_of_part(worker, spec, "train"), order.held(rank, world)
        train = load_pair_tensors(blocks, store, split.train, wanted, worker.columns)
        if mean_target_D is None and _has_baselines(worker):
            target = store.feature("target")
            means = TrainingMeans.of(train.target_BD.numpy(), target.token_width)
            mean_target_D = means.mean_target(target.scale)
        train = train.on(worker.device)

        def rest_of_epoch(state: TrainState) -> Batches:
            return batches_in_memory(train, order, state, worker)
    else:
        shard = ray.train.get_dataset_shard("train")

        def rest_of_epoch(state: TrainState) -> Batches:
            return iter_batches(shard, store, cfg.seed, state.epoch, rank, world, cfg.batch_size)

    if not len(split.val):
        return WorkerData(rest_of_epoch, spec.in_memory, None)
    return WorkerData(rest_of_epoch, spec.in_memory, *_validation_of_this_worker(worker, spec, mean_target_D))


def _has_baselines(worker: WorkerContext) -> bool:
    """Return True if validation pairs are compared with baselines; there are none of image tokens."""
    return bool(len(worker.context.split.val)) and not isinstance(worker.cfg, LanguageModelTrainConfig)


def _blocks_of_part(worker: WorkerContext, spec: WorkerSpec, part: str) -> Iterator[Block]:
    """Yield the pairs of a part: out of Ray's memory, or read here, where all of them need not fit into it."""
    if spec.reads_store:
        return read_blocks(worker.store, getattr(worker.context.split, part))
    return dataset_blocks(ray.train.get_dataset_shard(part), worker.store)


def _validation_of_this_worker(
    worker: WorkerContext, spec: WorkerSpec, mean_target_D: torch.Tensor | None
) -> tuple[PairTensors, BaselineContext | None]:
    """Take a worker's validation pairs, and the baselines of all of them; the same for any number of workers.

    Without a mean target there are no baselines.
    """
    store, split = worker.store, worker.context.split
    rows = np.arange(worker.pair_rank, len(split.val), worker.pair_world)
    others = derangement(store.index.sequence[split.val].tolist(), seed=0)
    blocks, wanted = _blocks_of_part(worker, spec, "val"), np.union1d(rows, others[rows])
    held = load_pair_tensors(blocks, store, split.val, wanted, worker.columns)
    val = held if worker.pair_world == 1 else PairTensors(rows, *held.take(rows))
    if mean_target_D is None:
        return val.on(worker.device), None
    if worker.part.count > 1:
        own = _count_share_of_baselines(worker, mean_target_D)
    else:
        own = count_fixed_baselines(store, val.event_BE.numpy(), val.target_BD.numpy(), mean_target_D)
    fixed = {name: all_reduce_counts(worker, counts) for name, counts in own.items()}
    held = held.on(worker.device)
    val = held if worker.pair_world == 1 else val.on(worker.device)
    return val, BaselineContext(Baselines(fixed, others), held)


def _count_share_of_baselines(worker: WorkerContext, mean_target_D: torch.Tensor) -> dict[str, AlignmentCounts]:
    """Count baselines, which compare whole features, of a share of the validation pairs, block by block."""
    store, share = worker.store, np.array_split(worker.context.split.val, worker.world)[worker.rank]
    none = load_pair_tensors((), store, share, np.arange(0))
    counts = count_fixed_baselines(store, none.event_BE.numpy(), none.target_BD.numpy(), mean_target_D)
    for _, event_BE, target_BD in read_blocks(store, share):
        for name, of_block in count_fixed_baselines(store, event_BE, target_BD, mean_target_D).items():
            counts[name] += of_block
    return counts


def _report(state: TrainState, val: dict[str, Any]) -> None:
    """Report to Ray Train's controller; every worker does so equally often."""
    ray.train.report({"epoch": state.epoch, "val_loss": val.get("loss")})

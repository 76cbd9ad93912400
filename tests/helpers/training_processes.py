"""Training by processes of this machine that talk over gloo, without Ray: the loop as its workers run it."""

import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ray_app.commands.train.context import RunContext
from ray_app.commands.train.loop import Batches, WorkerContext, WorkerData, batches_in_memory, train_epochs
from ray_app.commands.train.parallelism import join
from ray_app.commands.train.state import TrainState
from ray_app.config.train import TrainConfig
from ray_app.data.batch_order import ShardedBatchOrder
from ray_app.data.pair_tensors import PairTensors
from ray_app.runs.run_dir import open_run
from ray_app.store.pair_store import PairStore

CPU = torch.device("cpu")
PATIENCE = timedelta(seconds=120)


def train_here(
    cfg: TrainConfig, rank: int = 0, world: int = 1, die_at_step: int = -1, workers_of_node: int = 1
) -> None:
    """Run one worker in this process, from the run's newest checkpoint; the process ends without a word at a step."""
    store = PairStore.open(cfg.store)
    context = RunContext.of(cfg, store)
    split = context.split
    worker = WorkerContext(
        context, rank, world, CPU, member=join(context.division, rank, world, workers_of_node, CPU)
    )
    order = ShardedBatchOrder(len(split.train), cfg.batch_size, cfg.seed)
    train, val = (
        PairTensors(wanted, *map(torch.tensor, store.read_rows(rows[wanted]))).cut(worker.columns)
        for rows, wanted in (
            (split.train, order.held(worker.pair_rank, worker.pair_world)),
            (split.val, np.arange(worker.pair_rank, len(split.val), worker.pair_world)),
        )
    )

    def rest_of_epoch(state: TrainState) -> Batches:
        for batch in batches_in_memory(train, order, state, worker):
            if state.step == die_at_step:
                os._exit(9)
            yield batch

    cfg.folder.mkdir(exist_ok=True)
    with open_run(cfg.out) as run, run.event_log() if rank == 0 else nullcontext() as log:
        train_epochs(worker, run, WorkerData(rest_of_epoch, True, val), log, {}, lambda *_: None)


def _worker(rendezvous: str, cfg: TrainConfig, rank: int, world: int, die_at_step: int, workers_of_node: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", PATIENCE, world, rank)
    train_here(cfg, rank, world, die_at_step, workers_of_node)
    dist.destroy_process_group()


def train_on_processes(cfg: TrainConfig, die_at_step: int = -1, nodes: tuple[int, ...] = (1,)) -> None:
    """Train with `cfg.num_workers`, of which each node has so many.

    BrokenProcessPool: a worker has ended at `die_at_step`.
    """
    world = cfg.max_workers
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])  # imports once
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(world, mp_context=server) as processes,
    ):
        meeting = str(Path(folder) / "rendezvous")
        of_node = [count for count in nodes for _ in range(count)]
        started = [
            processes.submit(_worker, meeting, cfg, rank, world, die_at_step, of_node[rank % len(of_node)])
            for rank in range(world)
        ]
        for each in started:
            each.result()

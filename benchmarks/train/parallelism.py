"""Dividing the features against dividing the pairs: steps, bytes on the wire, memory and losses, in one run.

    python -m benchmarks.train.parallelism --folder /tmp/parallelism

The reference's adapter (`lightweight`, 150,528 wide, hidden 512, batch 32) on random pairs, trained by the training
loop in processes of this machine that talk over gloo, without Ray: one with one thread and with two, then two and
four workers of one thread by pairs and by features, in turn. Bytes are what the kernel counted on loopback, as root
in a network namespace of the script's own; memory is the most that each process had, before and after the save at its
end. Losses are compared step by step with those of the process with two threads.

A model of a step from the process with one thread is held against the workers that divide the features, and the
arithmetic of `scaling.py` for GPUs is done for both ways. Writes benchmarks/results/parallelism.json.
"""

import argparse
import ctypes
import os
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.provenance import require_commit, save
from benchmarks.train.scaling import ASSUMED, predicted, reduced
from ray_app import write_store
from ray_app.commands.train.context import RunContext
from ray_app.commands.train.loop import Batches, WorkerContext, WorkerData, parallel, train_epoch
from ray_app.commands.train.parallelism import join
from ray_app.commands.train.state import Checkpointer, TrainState, resume_or_init
from ray_app.config.train import TrainConfig
from ray_app.data.batch_order import BatchSlice
from ray_app.data.pair_tensors import PairTensors
from ray_app.runs.run_dir import open_run
from ray_app.store.pair_store import PairStore

PAIRS, BATCH, CORES = 64, 32, 2
NEW_NETWORK = 0x40000000
"""CLONE_NEWNET of Linux."""
REDUCES_A_STEP = 4
"""All-reduces of workers that divide features: activations, losses, gradient of activations, norm."""


@dataclass(frozen=True)
class Cell:
    """One way of training."""

    parallelism: str
    """What workers divide: `data` or `feature`."""
    workers: int
    """Number of processes."""
    threads: int = 1
    """Threads of each."""
    steps: int = 12
    """Number of steps."""

    @property
    def name(self) -> str:
        if self.workers == 1:
            return f"one worker, threads: {self.threads}"
        return f"{self.workers} workers, {self.parallelism}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="new folder; about 3 GB, removed at the end")
    parser.add_argument("--width", type=int, default=150_528)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50, help="of one and of two workers; others take 12 or fewer")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    alone = own_network()
    store = args.folder / "store"
    write_pairs(store, args.width)
    few = min(12, args.steps)
    cells = [Cell("data", 1, 1, few), Cell("data", 1, CORES, args.steps)]
    cells += [Cell(way, 2, 1, args.steps) for way in ("data", "feature")]
    cells += [Cell(way, 4, 1, few) for way in ("data", "feature")]
    measured = {cell.name: measure(cell, store, args.folder / "run", args.hidden) for cell in cells}
    shutil.rmtree(args.folder)
    save("parallelism", summary(cells, measured, vars(args) | {"folder": str(args.folder)}, own_network=alone))


def own_network() -> bool:
    """Leave the machine's network for an empty one with loopback, so that no other program's bytes are counted."""
    if os.geteuid() or not shutil.which("ip") or ctypes.CDLL(None).unshare(NEW_NETWORK):
        return False
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    return True


def write_pairs(store: Path, width: int) -> None:
    """Write random pairs that share a few causes."""
    draw = np.random.default_rng(0)
    causes = draw.random((PAIRS, 4), np.float32)
    event, target = (
        (causes @ draw.random((4, width), np.float32) * 40 + draw.random((PAIRS, width), np.float32) * 90).astype(
            np.uint8
        )
        for _ in range(2)
    )
    write_store(store, event=event, target=target, sequence=[f"drive {n // 8}" for n in range(PAIRS)])


def measure(cell: Cell, store: Path, run: Path, hidden: int) -> dict[str, Any]:
    """Train one cell in processes of its own."""
    cfg = TrainConfig(
        store=store,
        out=run,
        strategy="lightweight",
        hidden_dim=hidden,
        batch_size=BATCH,
        num_workers=cell.workers,
        parallelism=cell.parallelism if cell.workers > 1 else "auto",
    )
    server = get_context("forkserver")
    server.set_forkserver_preload(["ray_app.commands.train.loop"])
    run.mkdir()
    with ProcessPoolExecutor(cell.workers, mp_context=server) as processes:
        started = [processes.submit(worker, cell, cfg, rank) for rank in range(cell.workers)]
        of_ranks = [each.result() for each in started]
    shutil.rmtree(run)
    first = of_ranks[0]
    return {
        "step_s": round(statistics.median(first["step_s"][1:]), 4),
        "bytes_sent_by_a_worker_a_step": round(first["loopback_bytes"] / cell.steps / cell.workers),
        "peak_gib": [round(each["peak_gib"], 3) for each in of_ranks],
        "peak_gib_with_save": [round(each["peak_gib_with_save"], 3) for each in of_ranks],
        "gib_at_start": round(first["gib_at_start"], 3),
        "save_s": round(first["save_s"], 2),
        "losses": first["losses"],
    }


def worker(cell: Cell, cfg: TrainConfig, rank: int) -> dict[str, Any]:
    """One process of a cell: trains, then saves once."""
    torch.set_num_threads(cell.threads)
    at_start = memory_gib("VmRSS")
    if cell.workers > 1:
        dist.init_process_group("gloo", f"file://{cfg.folder}/rendezvous", world_size=cell.workers, rank=rank)
    store = PairStore.open(cfg.store)
    context = RunContext.of(cfg, store)
    me = WorkerContext(context, rank, cell.workers, torch.device("cpu"))
    me = replace(me, member=join(context.division, rank, cell.workers, cell.workers, me.device))
    pairs = PairTensors(np.arange(PAIRS), *map(torch.tensor, store.read_rows(np.arange(PAIRS)))).cut(me.columns)
    pairs = PairTensors(pairs.positions, pairs.event_BE.contiguous(), pairs.target_BD.contiguous())
    state = resume_or_init(context, None, me.device, part=me.part)
    model = parallel(state.objective, me)
    began, losses, loopback = [], [], []

    def batches() -> Batches:
        for batch in order(cell.steps, me.pair_rank, me.pair_world):
            began.append(time.perf_counter())
            losses.append(state.sums.loss)
            loopback.append(loopback_bytes())
            yield batch, *pairs.take(batch.positions)

    with open_run(cfg.out) as run, run.event_log() if rank == 0 else nullcontext() as log:
        no_log = Checkpointer(run, store, None, {})
        train_epoch(model, state, batches(), me, no_log, WorkerData(lambda _: batches(), False, None))
        ended, sent = time.perf_counter(), loopback_bytes() - loopback[0]
        peak = memory_gib("VmHWM")
        save_s = timed_save(Checkpointer(run, store, log, {}), state)
    if cell.workers > 1:
        dist.destroy_process_group()
    return {
        "step_s": [b - a for a, b in pairwise([*began, ended])],
        "losses": [(b - a) / BATCH for a, b in pairwise([*losses, state.sums.loss])],
        "loopback_bytes": sent,
        "gib_at_start": at_start,
        "peak_gib": peak,
        "peak_gib_with_save": memory_gib("VmHWM"),
        "save_s": save_s,
    }


def order(steps: int, rank: int, world: int) -> Iterator[BatchSlice]:
    """Yield batches of random pairs, the same for any number of workers."""
    first, last = rank * BATCH // world, (rank + 1) * BATCH // world
    for step in range(steps):
        yield BatchSlice(np.random.default_rng(step).permutation(PAIRS)[first:last], first, BATCH)


def timed_save(checkpointer: Checkpointer, state: TrainState) -> float:
    """Save on the first worker with the parts of the others; return the seconds."""
    began = time.perf_counter()
    checkpointer.within_epoch(state)
    return time.perf_counter() - began


def memory_gib(field: str) -> float:
    """One line of this process's /proc/self/status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 2**20


def loopback_bytes() -> int:
    """Bytes that were sent over loopback since the machine, or the namespace, has it."""
    (line,) = [line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[8])


def summary(
    cells: list[Cell], measured: dict[str, dict[str, Any]], settings: dict[str, Any], *, own_network: bool
) -> dict[str, Any]:
    """Compare the cells with one worker that has both cores."""
    one = measured[Cell("data", 1, CORES).name]
    for cell in cells:
        found = measured[cell.name]
        errors = [abs(a - b) / abs(b) for a, b in zip(found["losses"], one["losses"], strict=False)]
        found["steps"] = cell.steps
        found["speed_of_one"] = round(one["step_s"] / found["step_s"], 3)
        found["peak_of_one"] = round(max(found["peak_gib_with_save"]) / max(one["peak_gib_with_save"]), 3)
        found["largest_relative_loss_difference"] = max(errors)
    single = measured[Cell("data", 1, 1).name]["step_s"]
    return {
        "settings": settings,
        "batch": BATCH,
        "network": "of its own" if own_network else "shared with the machine's other programs, whose bytes count",
        "cells": measured,
        "model_of_a_step_by_features": {
            cell.name: {
                "model_s": round(single / min(cell.workers, CORES), 4),
                "measured_s": measured[cell.name]["step_s"],
            }
            for cell in cells
            if cell.parallelism == "feature"
        },
        "assumed": {**ASSUMED, "hidden": 512},
        "gpus": {
            str(count): {"by_pairs": predicted(count), "by_features": by_features(count)} for count in (1, 8, 64, 512)
        },
    }


def by_features(gpus: int) -> dict[str, float]:
    """Return a step of the reference's adapter with 32 pairs for each GPU, its features divided over all of them.

    Each has its share of the arithmetic and of the memory that weights and moments pass through.
    """
    a: dict[str, Any] = ASSUMED
    pairs = gpus * a["pairs_for_each_gpu"]
    computing = a["pairs_for_each_gpu"] * a["flop_for_each_pair"] / a["flop_per_s"]
    computing += a["parameters"] / gpus * a["bytes_of_memory_for_each_parameter_and_step"] / a["memory_bytes_per_s"]
    hidden_layer = (1 - 1 / gpus) * pairs * 6 * 512**2 / a["flop_per_s"]  # the same on every GPU
    sent = 4 * pairs * (2 * 512 + 4) / REDUCES_A_STEP
    reduce_s = REDUCES_A_STEP * reduced(gpus, sent, a["network_bytes_per_s"], a["latency_s"]) if gpus > 1 else 0.0
    step_s = computing + hidden_layer + reduce_s
    return {
        "step_ms": round(1000 * step_s, 2),
        "all_reduce_ms": round(1000 * reduce_s, 2),
        "pairs_per_s": round(pairs / step_s),
    }


if __name__ == "__main__":
    require_commit()
    main()

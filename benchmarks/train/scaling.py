"""What more raylets bring on two cores, and a model of the training step from its parts for more workers.

    python -m benchmarks.train.scaling --folder /tmp/scaling

One, two and four raylets of one CPU each on this machine, the head without any: `prepare` and `train` as users call
them. A step is taken apart: computing a share of a batch (the training loop alone, on one thread, without Ray), the
all-reduce of its gradients (processes over gloo, nothing else), and waiting, which is what is left of the step that
was measured on raylets. The model is

    step(N) = fixed + each * pairs per worker + 2 (N - 1) / N * bytes / bandwidth + 2 (N - 1) * latency

with its four numbers taken from some of the points (batches of 4 and 16 alone, all-reduces of two processes) and held
against the others. Four raylets share two cores: there the model lets each compute half as fast. The last
part applies it to GPUs that were not measured here: every number that is assumed is in the result. The raylets
share cores, memory and loopback: this says nothing of a network. Writes benchmarks/results/scaling.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from three_nodes import Nodes

from benchmarks.provenance import require_commit, save
from ray_app.commands.train.context import RunContext
from ray_app.commands.train.loop import WorkerContext, WorkerData, batches_in_memory, train_epochs
from ray_app.config.train import TrainConfig
from ray_app.data.batch_order import ShardedBatchOrder
from ray_app.data.pair_tensors import PairTensors
from ray_app.runs.event_log import EventLog, entries
from ray_app.runs.run_dir import RunDir
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs

RAY_APP = Path(sys.executable).with_name("ray-app")
SCENES = "--num-pairs 96 --num-sequences 12 --width 160 --height 120"
BATCH, EPOCHS = 16, 6
RAYLETS, CORES = (1, 2, 4), 2
HIDDEN = {"small": 16, "large": 64}
"""Of `lightweight`, at a width of 150,528: 4.8 and 19.3 million parameters."""
SIZES = [2**10, 2**20, 2**23, 2**25]
"""Numbers in an all-reduce."""
ASSUMED = {
    "parameters": 154_556_416,
    "pairs_for_each_gpu": 32,
    "flop_for_each_pair": 6 * 154_556_416,
    "flop_per_s": 20e12,
    "bytes_of_memory_for_each_parameter_and_step": 28,
    "memory_bytes_per_s": 2.5e12,
    "gradient_bytes_for_each_parameter": 4,
    "network_bytes_per_s": 40e9,
    "latency_s": 10e-6,
    "overlap": "none: the all-reduce begins when all gradients are there",
}
"""A GPU of the H100's class at a third of its float32 rate, one 400 Gbit/s port for each at 80 %."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for stores and runs")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    folder = args.folder.resolve()
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    by_workers = {str(n): on_raylets(n, folder) for n in RAYLETS}
    computing = {
        name: {
            str(batch): alone(folder / "store-1", folder / f"alone-{name}-{batch}", hidden, batch)
            for batch in (4, 8, 16)
        }
        for name, hidden in HIDDEN.items()
    }
    reducing = {str(n): all_reduces(folder, n) for n in RAYLETS[1:]}
    save(
        "scaling",
        {
            "scenes": SCENES,
            "batch": BATCH,
            "hidden": HIDDEN,
            "by_workers": by_workers,
            "prepare_speedup": {
                str(n): round(by_workers[str(n)]["prepare_pairs_per_s"] / by_workers["1"]["prepare_pairs_per_s"], 2)
                for n in RAYLETS[1:]
            },
            "computing_s": computing,
            "all_reduce_s": reducing,
            "parts_and_model": {
                name: parts(computing[name], reducing, by_workers, name, 2 * 150_528 * hidden)
                for name, hidden in HIDDEN.items()
            },
            "assumed": ASSUMED,
            "gpus": {str(n): predicted(n) for n in (1, 8, 64, 512)},
        },
    )


def on_raylets(workers: int, folder: Path) -> dict[str, Any]:
    """Measure what users see with so many raylets: pairs prepared a second, and the median step of each model."""
    nodes = Nodes(workers)
    environment = {**os.environ, "RAY_ADDRESS": nodes.address}

    def run_command(words: str) -> dict[str, Any]:
        done = subprocess.run(
            [str(RAY_APP), *words.split(), "--json"], env=environment, check=True, stdout=subprocess.PIPE
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    try:
        store = folder / f"store-{workers}"
        prepared = run_command(f"prepare scenes --out {store} {SCENES} --num-workers {workers}")
        seen = {"prepare_pairs_per_s": round(prepared["pairs"] / prepared["seconds"], 2)}
        for name, hidden in HIDDEN.items():
            run = folder / f"run-{workers}-{name}"
            words = f"train --store {store} --out {run} --tracking-uri sqlite:///{folder}/mlflow.db"
            words += f" --batch-size {BATCH} --num-epochs {EPOCHS} --early-stop-patience {EPOCHS}"
            run_command(
                f"{words} --strategy lightweight --hidden-dim {hidden} --num-workers {workers} --cpus-per-worker 1"
                " --parallelism data"
            )
            seen[f"step_s_{name}"] = step_seconds(run, BATCH)
        return seen
    finally:
        nodes.cluster.shutdown()


def alone(folder: Path, out: Path, hidden: int, batch: int) -> float:
    """Median step of the training loop in this process, on one thread."""
    cfg = TrainConfig(
        store=str(folder),
        out=out,
        strategy="lightweight",
        hidden_dim=hidden,
        batch_size=batch,
        num_epochs=2,
        early_stop_patience=2,
    )
    store = PairStore.open(folder)
    split = split_pairs(store.index, cfg.split_config)
    worker = WorkerContext(RunContext.of(cfg, store), 0, 1, torch.device("cpu"))
    lanes = ShardedBatchOrder(len(split.train), batch, cfg.seed)
    train = PairTensors(np.arange(len(split.train)), *map(torch.tensor, store.read_rows(split.train)))
    out.mkdir()
    with EventLog(out) as log:
        pairs = WorkerData(lambda state: batches_in_memory(train, lanes, state, worker), True, None)
        train_epochs(worker, RunDir(out), pairs, log, {}, lambda *_: None)
    return step_seconds(out, batch)


def step_seconds(run: Path, batch: int) -> float:
    """Median over the steps of full batches, but for the first of each epoch."""
    steps = [line for line in entries(run) if line["kind"] == "step"]
    took = [
        after["seconds"] - before["seconds"]
        for before, after in pairwise(steps)
        if after["epoch"] == before["epoch"] and after["pairs"] - before["pairs"] == batch
    ]
    return round(statistics.median(took), 4)


def all_reduces(folder: Path, workers: int) -> dict[str, float]:
    """Medians of an all-reduce of so many float32 numbers between so many processes."""
    context = get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=reduce_worker, args=(rank, workers, str(folder / f"gloo-{workers}"), queue))
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    found: dict[str, float] = queue.get(timeout=300)
    for process in processes:
        process.join()
    return found


def reduce_worker(rank: int, workers: int, file: str, queue: Any) -> None:
    """One of them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=workers)
    found = {}
    for size in SIZES:
        numbers, took = torch.zeros(size), []
        for _ in range(12):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(numbers)
            took.append(time.perf_counter() - began)
        found[str(size)] = round(statistics.median(took[2:]), 6)
    if rank == 0:
        queue.put(found)
    dist.destroy_process_group()


def parts(
    computing: dict[str, float],
    reducing: dict[str, dict[str, float]],
    by_workers: dict[str, Any],
    name: str,
    numbers: int,
) -> dict[str, Any]:
    """Take a step on several raylets apart, and compare the model with points that it was not made from."""
    small, large = str(SIZES[0]), str(SIZES[-1])
    each = (computing["16"] - computing["4"]) / 12
    fixed = computing["4"] - 4 * each
    bandwidth = 4 * (SIZES[-1] - SIZES[0]) / (reducing["2"][large] - reducing["2"][small])
    latency = reducing["2"][small] / 2

    def computed(workers: int, batch: int) -> float:
        return max(workers / CORES, 1) * (fixed + each * batch / workers)

    def model(workers: int, batch: int) -> float:
        return computed(workers, batch) + reduced(workers, 4 * numbers, bandwidth, latency)

    checks = {"alone, batch 8": (model(1, 8), computing["8"])}
    steps = {}
    for n in RAYLETS:
        measured, reduce_s = by_workers[str(n)][f"step_s_{name}"], reduced(n, 4 * numbers, bandwidth, latency)
        checks[f"{n} raylets, batch {BATCH}"] = (model(n, BATCH), measured)
        steps[str(n)] = {
            "step_s": measured,
            "of_it_computing_s": round(computed(n, BATCH), 4),
            "of_it_all_reduce_s": round(reduce_s, 4),
            "of_it_waiting_s": round(measured - computed(n, BATCH) - reduce_s, 4),
        }
    for n, size in product(RAYLETS[1:], SIZES[1:]):
        if (n, size) != (2, SIZES[-1]):
            modelled = reduced(n, 4 * size, bandwidth, latency)
            checks[f"all-reduce of {size} between {n}"] = (modelled, reducing[str(n)][str(size)])
    return {
        "gradient_bytes": 4 * numbers,
        "steps": steps,
        "model": {
            "fixed_s": round(fixed, 4),
            "each_pair_s": round(each, 4),
            "bandwidth_bytes_per_s": round(bandwidth),
            "latency_s": latency,
        },
        "checks": {
            place: {"model_s": round(modelled, 4), "measured_s": seen, "ratio": round(modelled / seen, 2)}
            for place, (modelled, seen) in checks.items()
        },
    }


def reduced(workers: int, size: float, bandwidth: float, latency: float) -> float:
    """Seconds of a ring all-reduce of so many bytes."""
    return 2 * (workers - 1) / workers * size / bandwidth + 2 * (workers - 1) * latency


def predicted(gpus: int) -> dict[str, float]:
    """Return a step of the reference's adapter with 32 pairs on each GPU, and what share of it is computing."""
    a: dict[str, Any] = ASSUMED
    computing = a["pairs_for_each_gpu"] * a["flop_for_each_pair"] / a["flop_per_s"]
    computing += a["parameters"] * a["bytes_of_memory_for_each_parameter_and_step"] / a["memory_bytes_per_s"]
    size = a["parameters"] * a["gradient_bytes_for_each_parameter"]
    reduce_s = reduced(gpus, size, a["network_bytes_per_s"], a["latency_s"])
    return {
        "step_ms": round(1000 * (computing + reduce_s), 2),
        "all_reduce_ms": round(1000 * reduce_s, 2),
        "efficiency": round(computing / (computing + reduce_s), 3),
        "pairs_per_s": round(gpus * a["pairs_for_each_gpu"] / (computing + reduce_s)),
    }


if __name__ == "__main__":
    require_commit()
    main()

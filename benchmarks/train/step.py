"""The training loop against a plain PyTorch loop: same model, data, batch and threads, in turn, in one run.

    python -m benchmarks.train.step --store STORE --folder /tmp/train-step

The plain loop alternates, step by step, with `ray_app.core.optimizer_step.training_step` in its own process:
that ratio is of the code alone, the other also of Ray's processes, which share the two cores. Compared is the
steady-state step, over all steps after the first epoch: the lower quartile, which other work on the machine
disturbs least, pooled over the rounds; also the medians of each round, the share of time spent waiting for data
after the first epoch, the time from the command to the first step, and two workers on the same cores. Writes
benchmarks/results/train_step.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.provenance import require_commit, save
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import build_adapter
from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.core.losses import AlignmentObjective, LossWeights
from ray_app.core.optimizer_step import decode, make_optimizer, training_step
from ray_app.runs.event_log import entries
from ray_app.store.pair_store import PairStore

RAY_APP = Path(sys.executable).with_name("ray-app")
BATCH, HIDDEN, LEARNING_RATE = 32, 512, 1e-3


class Plain(nn.Module):
    """The diagram of the reference, as one would write it down."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, HIDDEN),
            nn.LayerNorm(HIDDEN),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(HIDDEN, HIDDEN),
            nn.LayerNorm(HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) + x


def plain(store: Path, steps: int) -> dict[str, list[float]]:
    """Seconds of each step of the plain loop, and of ours in turn with it, over uint8 pairs in memory."""
    opened = PairStore.open(store)
    rows = np.arange(min(len(opened.index), 8 * BATCH))
    event, target = (torch.from_numpy(side) for side in opened.read_rows(rows))
    model = Plain(event.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    config = AdapterConfig("lightweight", event.shape[1], target.shape[1], HIDDEN)
    objective = AlignmentObjective(build_adapter(config, 0), LossWeights()).train()
    our_optimizer = make_optimizer(objective, LEARNING_RATE, 0.01)
    found: dict[str, list[float]] = {"plain": [], "ours": []}
    for step in range(steps):
        began = time.perf_counter()
        at = torch.randperm(len(rows))[:BATCH]
        x, y = event[at].float() / 255, target[at].float() / 255
        optimizer.zero_grad()
        aligned = model(x)
        loss = functional.mse_loss(aligned, y) + 0.5 * (1 - functional.cosine_similarity(aligned, y)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        middle = time.perf_counter()
        at = torch.randperm(len(rows))[:BATCH]
        pairs = (decode(side[at], 1 / 255, torch.device("cpu")) for side in (event, target))
        training_step(objective, our_optimizer, *pairs, BatchNoise(0, step, 0, BATCH, BATCH), global_pairs=BATCH)
        found["plain"].append(middle - began)
        found["ours"].append(time.perf_counter() - middle)
    return {name: seconds[2:] for name, seconds in found.items()}


def ours(store: Path, run: Path, workers: int, epochs: int) -> dict[str, Any]:
    """Seconds of each whole step after the first epoch, the share of waiting, and the seconds to the first step."""
    flags = ["--store", store, "--out", run, "--num-epochs", epochs, "--num-workers", workers]
    flags += [
        "--strategy",
        "lightweight",
        "--parallelism",
        "data",
        "--batch-size",
        BATCH,
        "--hidden-dim",
        HIDDEN,
        "--early-stop-patience",
        epochs,
    ]
    flags += ["--tracking-uri", f"sqlite:///{run.parent}/mlflow.db", "--json"]
    began = time.time()
    done = subprocess.run([str(RAY_APP), "train", *map(str, flags)], stdout=subprocess.PIPE, check=True)
    lines = entries(run)
    first_step = next(line for line in lines if line["kind"] == "step")
    later = [line for line in lines if line["kind"] == "step" and line["epoch"] > 1]
    steps = [b["seconds"] - a["seconds"] for a, b in pairwise(later) if a["epoch"] == b["epoch"]]
    epochs_after = [line["train"] for line in lines if line["kind"] == "epoch" and line["epoch"] > 1]
    return {
        "steps": steps,
        "first_step_s": first_step["time"] - began,
        "wait_share": sum(e["data_wait_seconds"] for e in epochs_after) / sum(e["seconds"] for e in epochs_after),
        "pairs_per_second": json.loads(done.stdout)["pairs_per_second"],
    }


def lower_quartile(seconds: list[float]) -> float:
    """Return the lower quartile: a quarter of the steps were faster."""
    return statistics.quantiles(seconds, n=4)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for the runs")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--plain", type=int, help="only the plain loop, so many steps (used by this script itself)")
    args = parser.parse_args()
    if args.plain:
        print(json.dumps(plain(args.store, args.plain)))
        return
    args.folder.mkdir(parents=True)
    alone, in_process = [], []
    for n in range(args.rounds):
        command = [
            sys.executable,
            "-m",
            "benchmarks.train.step",
            "--store",
            args.store,
            "--folder",
            args.folder,
            "--plain",
            30,
        ]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True)
        in_process.append(json.loads(done.stdout))
        alone.append(ours(args.store, args.folder / f"one-{n}", 1, args.epochs))
    two = ours(args.store, args.folder / "two", 2, args.epochs)
    loop, core = ([found[name] for found in in_process] for name in ("plain", "ours"))
    core_s = lower_quartile([s for c in core for s in c])
    ratios = [statistics.median(a["steps"]) / statistics.median(b) for a, b in zip(alone, loop, strict=True)]
    ours_s, plain_s = (
        lower_quartile([s for a in alone for s in a["steps"]]),
        lower_quartile([s for b in loop for s in b]),
    )
    save(
        "train_step",
        {
            "batch": BATCH,
            "hidden_dim": HIDDEN,
            "plain_step_ms": [round(1e3 * statistics.median(b), 1) for b in loop],
            "ours_step_ms": [round(1e3 * statistics.median(a["steps"]), 1) for a in alone],
            "ratio_by_round": [round(r, 3) for r in ratios],
            "lower_quartile_ms": {"plain": round(1e3 * plain_s, 1), "ours": round(1e3 * ours_s, 1)},
            "ratio": round(ours_s / plain_s, 3),
            "command_to_first_step_s": [round(a["first_step_s"], 1) for a in alone],
            "ratio_in_one_process_without_ray": round(core_s / plain_s, 3),
            "data_wait_fraction_after_first_epoch": [round(a["wait_share"], 4) for a in alone],
            "two_workers": {
                "step_ms": round(1e3 * statistics.median(two["steps"]), 1),
                "data_wait_fraction": round(two["wait_share"], 4),
                "speedup_over_one": round(ours_s / lower_quartile(two["steps"]), 3),
            },
        },
    )


if __name__ == "__main__":
    require_commit()
    main()

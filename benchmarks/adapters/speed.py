"""What adapters cost: latency of one pair, and time to the reference's acceptance.

    python -m benchmarks.adapters.speed latency
    python -m benchmarks.adapters.speed race --store STORE --folder /tmp/race

latency: one core, float32, 150,528 wide, the strategies in turn. race: `lightweight` for 3 epochs as the reference
trains it, then `conv` on the same pairs, validating from its start, until its validation acceptance is as high; a
finished run in the folder is not repeated. Each writes its part of benchmarks/results/adapter_speed.json.
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import RESULTS, provenance, require_commit
from ray_app.cluster.connection import cluster
from ray_app.commands.quickstart import RECIPE
from ray_app.commands.train.command import run_train
from ray_app.config.train import TrainConfig
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import STRATEGIES, build_adapter, num_parameters
from ray_app.core.metrics import THETA, rate_key
from ray_app.runs.event_log import entries
from ray_app.store.checkpoint import load_training_state
from ray_app.store.manifest import PIXELS

RAY_APP = Path(sys.executable).with_name("ray-app")
ROUNDS = 40


def latency() -> dict[str, Any]:
    """Milliseconds of one forward pass of one pair; the strategies take turns, so that all see the same machine."""
    torch.set_num_threads(1)
    adapters = {}
    for name in ("lightweight", "lightweight_reference", "conv", "lowrank"):
        kind = STRATEGIES[name]
        config = AdapterConfig(
            name,
            PIXELS.width,
            PIXELS.width,
            kind.HIDDEN_DIM,
            event_shape=PIXELS.shape,
            target_shape=PIXELS.shape,
            depth=kind.DEPTH,
        )
        adapters[name] = build_adapter(config, 0).eval()
    event = torch.rand(1, PIXELS.width, generator=torch.Generator().manual_seed(0))
    spent: dict[str, list[float]] = {name: [] for name in adapters}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for name, adapter in adapters.items():
                began = time.perf_counter()
                adapter(event)
                spent[name].append(1e3 * (time.perf_counter() - began))
    reference = statistics.median(spent["lightweight"])
    return {
        name: {
            "parameters": num_parameters(adapters[name]),
            "median_ms": round(statistics.median(times), 3),
            "quartiles_ms": [round(each, 3) for each in statistics.quantiles(times, n=4)],
            "of_lightweight": round(statistics.median(times) / reference, 4),
        }
        for name, times in spent.items()
    }


def race(store: Path, folder: Path, seeds: list[int]) -> dict[str, Any]:
    """Seconds until a validation has the acceptance that the reference's recipe has after 3 epochs."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    common = {"store": str(store), "tracking_uri": f"sqlite:///{folder}/mlflow.db", "num_epochs": 3}
    rivals: dict[str, dict[str, Any]] = {
        "lightweight": {"strategy": "lightweight"},
        "conv": {"strategy": "conv", "val_every_steps": 2, **RECIPE},
    }
    wanted = {folder / f"{name}-{seed}": (seed, settings) for seed in seeds for name, settings in rivals.items()}
    with nullcontext() if all(out.exists() for out in wanted) else cluster(None):
        for out, (seed, settings) in wanted.items():
            if not out.exists():
                run_train(TrainConfig(out=out, seed=seed, **common, **settings))
    found = [raced(folder, int(path.name.partition("-")[2])) for path in sorted(folder.glob("conv-*"))]
    shares = [name for name in found[0] if name.startswith("share")]
    return {
        "runs": found,
        **{f"{name}_mean": statistics.fmean(each[name] for each in found) for name in shares},
        **{f"{name}_worst": max(each[name] for each in found) for name in shares},
    }


def raced(folder: Path, seed: int) -> dict[str, Any]:
    """Both runs of a seed, out of their event logs.

    `share`: until the first validation that is as high, of `lightweight`'s time. `share_trained`: until the first one
    after a step of training; `share_wall`: by the clock, from the command's first line in the event log on.
    """
    slow, fast = timeline(folder / f"lightweight-{seed}"), timeline(folder / f"conv-{seed}")
    goal, needed = slow[-1]["accepted"], slow[-1]
    reached = next(each for each in fast if each["accepted"] >= goal)
    trained = next(each for each in fast if each["accepted"] >= goal and each["step"] > 0)
    return {
        "seed": seed,
        "goal": goal,
        "reached": reached,
        "reached_trained": trained,
        "lightweight": needed,
        "share": reached["seconds"] / needed["seconds"],
        "share_trained": trained["seconds"] / needed["seconds"],
        "share_wall": reached["wall_seconds"] / needed["wall_seconds"],
        "conv_validations": fast,
        "lightweight_validations": slow,
    }


def timeline(run: Path) -> list[dict[str, Any]]:
    """Every validation of a run: `step`, `accepted` at θ, `seconds` and `wall_seconds` until it was known.

    `seconds` are those of the pass that finds the mean target, of training steps and of validations within epochs;
    without reading the pairs, the worker's start and saving, which all runs have alike or to `conv`'s advantage.
    """
    lines = entries(run)
    started = next(line["time"] for line in lines if line["kind"] == "run_started")
    start = run / "init"
    spent = load_training_state(start)[1]["seconds"] if start.is_dir() else 0.0
    found = []
    for line in lines:
        if line["kind"] == "validation":
            spent += line["seconds"]
            seconds, at = spent + line["trained_seconds"], line["time"]
        elif line["kind"] == "epoch":
            spent += line["train"]["seconds"]
            seconds, at = spent, line["time"] - line["save_seconds"]
        else:
            continue
        accepted = line["val"]["cosine_accept_rate"][rate_key(THETA)]
        found.append(
            {"step": line["global_step"], "accepted": accepted, "seconds": seconds, "wall_seconds": at - started}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("latency", "race"))
    parser.add_argument("--store", type=Path)
    parser.add_argument("--folder", type=Path, help="for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    result = latency() if args.what == "latency" else race(args.store, args.folder, args.seeds)
    path = RESULTS / "adapter_speed.json"
    whole = json.loads(path.read_text()) if path.is_file() else {}
    origin = {"provenance": provenance()}  # of the newest part above all, and of each part
    path.write_text(json.dumps({**whole, **origin, args.what: {**origin, **result}}, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    require_commit()
    main()

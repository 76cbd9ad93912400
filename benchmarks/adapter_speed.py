"""What adapters cost: latency of one pair, time to the reference's acceptance, a sweep in the compressed space.

    .venv/bin/python benchmarks/adapter_speed.py latency
    .venv/bin/python benchmarks/adapter_speed.py race --store STORE --folder /tmp/race
    .venv/bin/python benchmarks/adapter_speed.py sweep --store STORE --folder /tmp/sweep --full-width-seconds 413

latency: one core, float32, 150,528 wide, the strategies in turn. race: `lightweight` for 3 epochs as the reference
trains it, then `conv` on the same pairs, until its validation acceptance is as high: at its start, which is the mean
target, or after an epoch; times are those of training steps, and of the pass that finds the mean target. sweep:
tune_configs/compressed.yaml, its subspaces found first, and its winner's last trainings apart; what it has to stay
below is twice the seconds of a full-width training. Each writes its part of benchmarks/results/adapter_speed.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from provenance import RESULTS, provenance

from ray_app.config import TrainConfig
from ray_app.core.adapter import STRATEGIES, AdapterConfig, build_adapter, num_parameters
from ray_app.core.metrics import THETA, cos_sim, rate_key
from ray_app.jobs.cluster import cluster
from ray_app.jobs.journal import entries
from ray_app.jobs.quickstart import RECIPE
from ray_app.jobs.train import run_train
from ray_app.store.checkpoint import load_training_state
from ray_app.store.manifest import PIXELS
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs

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
    """Seconds until the validation acceptance that the reference's recipe has after 3 epochs."""
    found: list[dict[str, Any]] = []
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with cluster(None):
        for seed in seeds:
            runs: dict[str, dict[str, Any]] = {}
            for name, settings in (
                ("lightweight", {"strategy": "lightweight", "num_epochs": 3}),
                ("conv", {"strategy": "conv", "num_epochs": 3, **RECIPE}),
            ):
                uri = f"sqlite:///{folder}/mlflow.db"
                cfg = TrainConfig(
                    store=str(store), out=folder / f"{name}-{seed}", seed=seed, tracking_uri=uri, **settings
                )
                run_train(cfg)
                lines = [line for line in entries(cfg.out) if line["kind"] == "epoch"]
                accepted = [line["val"]["cosine_accept_rate"][rate_key(THETA)] for line in lines]
                seconds = [line["train"]["seconds"] for line in lines]
                start = load_training_state(cfg.out / "start")[1]["seconds"] if name == "conv" else 0.0
                runs[name] = {"accepted": accepted, "epoch_seconds": seconds, "start_seconds": start}
            goal, conv = runs["lightweight"]["accepted"][-1], runs["conv"]
            conv["accepted"].insert(0, accepted_at_start(cfg))
            epochs = next(n for n, rate in enumerate(conv["accepted"]) if rate >= goal)
            spent = conv["start_seconds"] + sum(conv["epoch_seconds"][:epochs])
            one = conv["start_seconds"] + conv["epoch_seconds"][0]
            needed = sum(runs["lightweight"]["epoch_seconds"])
            found.append({"seed": seed, "goal": goal, "conv_epochs": epochs, "conv_seconds": spent})
            found[-1] |= {"lightweight_seconds": needed, "ratio": spent / needed, **runs}
            found[-1]["ratio_with_one_epoch"] = one / needed
    ratios = [each["ratio"] for each in found]
    return {"runs": found, "ratio_mean": statistics.fmean(ratios), "ratio_worst": max(ratios)}


def accepted_at_start(cfg: TrainConfig) -> float:
    """Validation acceptance of the mean training target, which `conv` answers before its first step."""
    store = PairStore.open(cfg.store)
    _, target_ND = store.read_rows(split_pairs(store.index, cfg.split_config).val)
    mean_D = load_training_state(cfg.out / "start")[0]["target_mean"]
    cos_N = cos_sim(mean_D.expand(len(target_ND), -1), torch.from_numpy(target_ND).float())
    return float((cos_N > THETA).double().mean())


def sweep(store: Path, folder: Path, full_width_seconds: float) -> dict[str, Any]:
    """Seconds of the subspaces, of 32 trials, and of the last trainings, which are judged at full width."""
    store, folder = store.absolute(), folder.absolute()
    uri = f"sqlite:///{folder}/mlflow.db"
    folder.mkdir(parents=True, exist_ok=True)
    lines = Path(__file__).parents[1].joinpath("tune_configs/compressed.yaml").read_text()
    yaml = folder / "compressed.yaml"
    yaml.write_text(lines.replace("runs/start/start", str(folder / "start" / "start")))
    common = ["--store", str(store), "--tracking-uri", uri, "--json"]
    first = ["--strategy", "lowrank", "--space", "compressed", "--num-epochs", "1", "--out", str(folder / "start")]
    subspaces = timed("train", *first, *common)
    searched = timed("tune", str(yaml), "--out", str(folder / "search"), "--no-final", "--yes", *common)
    confirmed = timed("tune", "--resume", str(folder / "search"), "--yes", "--tracking-uri", uri, "--json")
    total = subspaces["seconds"] + searched["seconds"]
    return {
        "full_width_training_seconds": full_width_seconds,
        "subspaces_seconds": subspaces["seconds"],
        "search_seconds": searched["seconds"],
        "of_two_full_width_trainings": total / (2 * full_width_seconds),
        "last_trainings_seconds": confirmed["seconds"],
        "best": searched["result"]["best"],
        "at_full_width": confirmed["result"]["final"],
    }


def timed(*words: str) -> dict[str, Any]:
    """A command of `ray-app`, its result and its seconds."""
    began = time.monotonic()
    done = subprocess.run([str(RAY_APP), *words], stdout=subprocess.PIPE, check=True)
    return {"seconds": round(time.monotonic() - began, 1), "result": json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("latency", "race", "sweep"))
    parser.add_argument("--store", type=Path)
    parser.add_argument("--folder", type=Path, help="new folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--full-width-seconds", type=float, help="of one training, as reference_job.json has it")
    args = parser.parse_args()
    if args.what == "latency":
        result = latency()
    elif args.what == "race":
        result = race(args.store, args.folder, args.seeds)
    else:
        result = sweep(args.store, args.folder, args.full_width_seconds)
    path = RESULTS / "adapter_speed.json"
    whole = json.loads(path.read_text()) if path.is_file() else {}
    told = {"provenance": provenance()}  # of the newest part above all, and of each part
    path.write_text(json.dumps({**whole, **told, args.what: {**told, **result}}, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""What adapters cost: latency of one pair, time to the reference's acceptance, the compressed space, a sweep in it.

    python -m benchmarks.adapters.speed latency
    python -m benchmarks.adapters.speed race --store STORE --folder /tmp/race
    python -m benchmarks.adapters.speed space --store STORE
    python -m benchmarks.adapters.speed sweep --store STORE --folder /tmp/sweep --full-width-seconds 413

latency: one core, float32, 150,528 wide, the strategies in turn. race: `lightweight` for 3 epochs as the reference
trains it, then `conv` on the same pairs, validating from its start on, until its validation acceptance is as high;
what is finished in the folder is not run again. space: an epoch at full width and one in the compressed space in
turn, without Ray, on pairs in memory; then losses and metrics of the validation part from the few numbers against
those of the full-width evaluator. sweep: tune_configs/compressed.yaml, its subspaces found first, and its winner's
last trainings apart; what it has to stay below is twice the seconds of a full-width training. Each
writes its part of benchmarks/results/adapter_speed.json.

Shapes: B = pairs, E, D = widths of event and target.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import AdamW

from benchmarks.provenance import RESULTS, provenance, require_commit
from ray_app.cluster.connection import cluster
from ray_app.commands.quickstart import RECIPE
from ray_app.commands.train.command import run_train
from ray_app.commands.train.initialization import PairsInMemory, decode_pair
from ray_app.config.base import SplitConfig
from ray_app.config.train import TrainConfig
from ray_app.core.adapters.base import InitStats
from ray_app.core.adapters.initialization import find_start
from ray_app.core.adapters.registry import STRATEGIES, AdapterConfig, build_adapter, num_parameters
from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.core.evaluation import AlignmentEvaluator
from ray_app.core.losses import AlignmentObjective, CompressedObjective, LossWeights
from ray_app.core.metrics import THETA, AlignmentCounts, rate_key
from ray_app.core.optimizer_step import make_optimizer, training_step
from ray_app.data.pair_tensors import PairTensors
from ray_app.runs.event_log import entries
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
    """Seconds until a validation has the acceptance that the reference's recipe has after 3 epochs."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    common = {"store": str(store), "tracking_uri": f"sqlite:///{folder}/mlflow.db", "num_epochs": 3}
    rivals: dict[str, dict[str, Any]] = {
        "lightweight": {"strategy": "lightweight"},
        "conv": {"strategy": "conv", "validate_every": 2, **RECIPE},
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
    begun = next(line["time"] for line in lines if line["kind"] == "run_started")
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
            {"step": line["global_step"], "accepted": accepted, "seconds": seconds, "wall_seconds": at - begun}
        )
    return found


STRATEGIES_BETWEEN_SUBSPACES = ("lowrank", "lightweight_subspace")
BATCH = 32


def space(folder: Path, rank: int, rounds: int) -> dict[str, Any]:
    """Seconds of an epoch in each space, in turn, and by how much numbers from the compressed pairs are off."""
    store = PairStore.open(folder)
    split = split_pairs(store.index, SplitConfig())
    train, val = (
        PairTensors(np.arange(len(rows)), *(torch.from_numpy(side) for side in store.read_rows(rows)))
        for rows in (split.train, split.val)
    )
    pairs = PairsInMemory(store, train, val)
    began = time.perf_counter()
    start = find_start(pairs.reduce_over_batches, "subspaces", rank, len(split.train), 0)
    few_train = PairTensors(train.positions, *pairs.compress_pairs("train", start))
    few_val = PairTensors(val.positions, *pairs.compress_pairs("val", start))
    found: dict[str, Any] = {
        "train_pairs": len(split.train),
        "val_pairs": len(split.val),
        "width": store.feature("target").width,
        "rank": rank,
        "start_seconds": round(time.perf_counter() - began, 3),
    }
    for strategy in STRATEGIES_BETWEEN_SUBSPACES:
        full, compressed = both_objectives(store, strategy, rank, start)
        optimizers = [make_optimizer(objective, 1e-3, 0.01) for objective in (full, compressed)]
        spent: dict[str, list[float]] = {"full": [], "compressed": []}
        for number in range(rounds):
            spent["full"].append(epoch_seconds(full, optimizers[0], train, store, number))
            spent["compressed"].append(epoch_seconds(compressed, optimizers[1], few_train, None, number))
        medians = {name: statistics.median(times) for name, times in spent.items()}
        found[strategy] = {
            "epoch_seconds": {name: [round(each, 4) for each in times] for name, times in spent.items()},
            "compressed_of_full": medians["compressed"] / medians["full"],
            "off_by": off_by(compressed, store, start["target_mean"], val, few_val),
        }
    return found


def both_objectives(
    store: PairStore, strategy: str, rank: int, start: InitStats
) -> tuple[AlignmentObjective, CompressedObjective]:
    """The same adapter twice, with every loss that both spaces have."""
    event, target = store.feature("event"), store.feature("target")
    hidden = STRATEGIES[strategy].HIDDEN_DIM
    config = AdapterConfig(strategy, event.width, target.width, hidden, rank=rank)
    contrastive = 0.1 if strategy == "lowrank" else 0.0  # the other adds its events, which only full width has
    weights = LossWeights(contrastive=contrastive, accept=0.5, accept_thetas=(0.8, 0.9), centred=0.2)
    adapters = [build_adapter(config, 0) for _ in range(2)]
    for adapter in adapters:
        adapter.initialize_from(start, spectral=False)
    mean_D = start["target_mean"]
    return (
        AlignmentObjective(adapters[0], weights, mean_target_D=mean_D),
        CompressedObjective(adapters[1], weights, mean_target_D=mean_D),
    )


def epoch_seconds(
    objective: AlignmentObjective, optimizer: AdamW, held: PairTensors, store: PairStore | None, number: int
) -> float:
    """Of one pass of training steps; with a store its features are decoded, as they are in training."""
    objective.train()
    order = np.random.default_rng(number).permutation(len(held.positions))
    began = time.perf_counter()
    for step, rows in enumerate(np.array_split(order, -(-len(order) // BATCH))):
        event_BE, target_BD = held.take(rows)
        if store:
            event_BE, target_BD = decode_pair(store, event_BE, target_BD)
        noise = BatchNoise(0, number * len(order) + step, 0, len(rows), len(rows))
        training_step(objective, optimizer, event_BE, target_BD, noise, global_pairs=len(rows))
    return time.perf_counter() - began


@torch.no_grad()
def off_by(
    compressed: CompressedObjective, store: PairStore, mean_D: torch.Tensor, val: PairTensors, few: PairTensors
) -> dict[str, float]:
    """Largest differences over validation pairs, and of the metrics: compressed against the full-width evaluator.

    The adapter is the one that was trained in the compressed space; losses are relative to the largest one.
    """
    adapter = compressed.eval().adapter
    full = AlignmentObjective(adapter, compressed.weights, mean_target_D=mean_D).eval()
    full.log_temperature = compressed.log_temperature
    scales = store.feature("event").scale, store.feature("target").scale
    evaluator = AlignmentEvaluator(adapter, mean_D, *scales, hold=False)
    seen: dict[str, list[torch.Tensor]] = {}
    for rows in np.array_split(val.positions, -(-len(val.positions) // BATCH)):
        wide, short = val.take(rows), compressed(*few.take(rows))
        evaluated, losses = evaluator.add(*wide), full(*decode_pair(store, *wide))
        for name, value in (
            *((f"{key}_full", each) for key, each in losses.items()),
            *((f"{key}_compressed", each) for key, each in short.items()),
            ("judged", evaluated["after"]),
        ):
            seen.setdefault(name, []).append(value)
    numbers = {name: torch.cat(parts).double() for name, parts in seen.items()}
    judged, told = (AlignmentCounts.of(numbers[name]) for name in ("judged", "cos_sim_compressed"))
    differ = {
        f"{key}_relative": float(
            (numbers[f"{key}_compressed"] - numbers[f"{key}_full"]).abs().max() / numbers[f"{key}_full"].abs().max()
        )
        for key in losses
        if key != "cos_sim"
    }
    return {
        **differ,
        "cos_sim": float((numbers["cos_sim_compressed"] - numbers["judged"]).abs().max()),
        "cos_sim_mean": abs(told.cos_sum - judged.cos_sum) / judged.pairs,
        "pairs_accepted_otherwise": sum(abs(a - b) for a, b in zip(told.accepted, judged.accepted, strict=True)),
    }


def sweep(store: Path, folder: Path, full_width_seconds: float) -> dict[str, Any]:
    """Seconds of the subspaces, of 32 trials, and of the last trainings, which are judged at full width."""
    store, folder = store.absolute(), folder.absolute()
    uri = f"sqlite:///{folder}/mlflow.db"
    folder.mkdir(parents=True, exist_ok=True)
    lines = Path(__file__).parents[2].joinpath("tune_configs/compressed.yaml").read_text()
    yaml = folder / "compressed.yaml"
    assert "start: runs/start/init" in lines, "the sweep would find its subspaces anew in every trial"
    yaml.write_text(lines.replace("runs/start/init", str(folder / "start" / "init")))
    common = ["--store", str(store), "--tracking-uri", uri, "--json"]
    first = ["--strategy", "lowrank", "--space", "compressed", "--num-epochs", "1", "--out", str(folder / "start")]
    subspaces = timed("train", *first, *common)
    searched = timed("tune", str(yaml), "--out", str(folder / "search"), "--no-final", "--yes", *common)
    confirmed = timed("tune", "--resume", str(folder / "search"), "--yes", "--tracking-uri", uri, "--json")
    return swept(full_width_seconds, subspaces["seconds"], searched["seconds"], confirmed)


def swept(full_s: float, subspaces_s: float, search_s: float, confirmed: dict[str, Any]) -> dict[str, Any]:
    """What the README tells, of the seconds and of what `tune` says at its end."""
    result = confirmed["result"]
    best, final = result["best"], result["final"]
    return {
        "full_width_training_seconds": full_s,
        "subspaces_seconds": subspaces_s,
        "search_seconds": search_s,
        "subspaces_and_search_seconds": round(subspaces_s + search_s, 1),
        "of_two_full_width_trainings": round((subspaces_s + search_s) / (2 * full_s), 3),
        "trials": len(result["trials"]),
        "best": {
            "setting": best["config"],
            "parameters": best["parameters"],
            "accept_rate": best["objective"],
            "lift": best["lift"],
        },
        "last_trainings_seconds": confirmed["seconds"],
        "at_full_width": [{key: each for key, each in seed.items() if key != "run"} for seed in final["seeds"]],
        "over_seeds": final["test"],
    }


def timed(*words: str) -> dict[str, Any]:
    """A command of `ray-app`, its result and its seconds."""
    began = time.monotonic()
    done = subprocess.run([str(RAY_APP), *words], stdout=subprocess.PIPE, check=True)
    return {"seconds": round(time.monotonic() - began, 1), "result": json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("latency", "race", "space", "sweep"))
    parser.add_argument("--store", type=Path)
    parser.add_argument("--folder", type=Path, help="for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="epochs in each space")
    parser.add_argument("--full-width-seconds", type=float, help="of one training, as reference_job.json has it")
    args = parser.parse_args()
    if args.what == "latency":
        result = latency()
    elif args.what == "race":
        result = race(args.store, args.folder, args.seeds)
    elif args.what == "space":
        result = space(args.store, args.rank, args.rounds)
    else:
        result = sweep(args.store, args.folder, args.full_width_seconds)
    path = RESULTS / "adapter_speed.json"
    whole = json.loads(path.read_text()) if path.is_file() else {}
    told = {"provenance": provenance()}  # of the newest part above all, and of each part
    path.write_text(json.dumps({**whole, **told, args.what: {**told, **result}}, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    require_commit()
    main()

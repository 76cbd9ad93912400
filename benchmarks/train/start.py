"""From the command to the end of the first step: `ray-app train` against the shortest program with Ray Train.

    python -m benchmarks.train.start --store STORE --folder runs/start

Both run in turn. The short program starts Ray, one worker and nothing else: no split, no baselines, no checkpoint, no
tracking. Its worker reads the store's pairs into memory, draws the weights of the same adapter and takes one step.
What it needs is the time of Ray, torch and the pairs themselves. Writes benchmarks/results/train_start.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.provenance import require_commit, save
from benchmarks.train.step import BATCH, HIDDEN, LEARNING_RATE, RAY_APP
from ray_app.runs.event_log import entries


def short_program(store: Path, folder: Path) -> None:
    """Take one step by Ray Train; print the times at which each stage ended."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ended = {"imports": time.time()}
    ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    ended["ray"] = time.time()
    trainer = TorchTrainer(
        one_step,
        train_loop_config={"store": str(store), "times": str(folder / "times.json")},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(storage_path=str(folder), name="short"),
    )
    trainer.fit()
    print(json.dumps(ended | json.loads((folder / "times.json").read_text())))


def one_step(config: dict[str, str]) -> None:
    """Read, draw and step in a worker of Ray Train."""
    began = time.time()
    import torch

    from benchmarks.train.step import Plain
    from ray_app.store.pair_store import PairStore

    opened = PairStore.open(Path(config["store"]))
    event, target = (torch.from_numpy(side) for side in opened.read_rows(range(len(opened.index))))
    read = time.time()
    model = Plain(event.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    drawn = time.time()
    aligned = model(event[:BATCH].float() / 255)
    torch.nn.functional.mse_loss(aligned, target[:BATCH].float() / 255).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    times = {"worker": began, "pairs": read, "weights": drawn, "step": time.time()}
    Path(config["times"]).write_text(json.dumps(times))


def short(store: Path, folder: Path) -> dict[str, float]:
    """Return the seconds of each stage of the short program."""
    folder.mkdir()
    command = [sys.executable, "-m", "benchmarks.train.start", "--store", store, "--folder", folder, "--short"]
    before = time.time()
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True)
    stages = {}
    for name, ended in json.loads(done.stdout).items():
        stages[name] = ended - before
        before = ended
    return {**stages, "first_step": sum(stages.values())}


def ours(store: Path, folder: Path) -> float:
    """Return the seconds from the command of `train` to the end of its first step."""
    folder.mkdir()
    flags = ["--store", store, "--out", folder / "run", "--num-epochs", 1, "--strategy", "lightweight"]
    flags += ["--batch-size", BATCH, "--hidden-dim", HIDDEN, "--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    began = time.time()
    subprocess.run([str(RAY_APP), "train", *map(str, flags)], check=True, stderr=subprocess.DEVNULL)
    first: float = next(line["time"] for line in entries(folder / "run") if line["kind"] == "step")
    return first - began


def summary(rounds: list[dict[str, float]], found: list[float]) -> dict[str, Any]:
    """Return medians over the rounds, and the ratio of each round."""
    stages = {name: round(statistics.median(each[name] for each in rounds), 1) for name in rounds[0]}
    ratios = [one / each["first_step"] for one, each in zip(found, rounds, strict=True)]
    return {
        "short_program_s": stages,
        "train_s": [round(each, 1) for each in found],
        "train_median_s": round(statistics.median(found), 1),
        "ratio_by_round": [round(each, 2) for each in ratios],
        "ratio": round(statistics.median(ratios), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for the runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="only the short program (used by this script itself)")
    args = parser.parse_args()
    store, folder = args.store.absolute(), args.folder.absolute()
    if args.short:
        short_program(store, folder)
        return
    folder.mkdir(parents=True)
    rounds, found = [], []
    for n in range(args.rounds):
        rounds.append(short(store, folder / f"short-{n}"))
        found.append(ours(store, folder / f"train-{n}"))
        print(rounds[-1], found[-1])
    save("train_start", summary(rounds, found))


if __name__ == "__main__":
    require_commit()
    main()

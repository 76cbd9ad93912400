"""ASHA against running every trial to its end: the same space, seeds and pairs; what it finds, and at how many steps.

    python -m benchmarks.tune.asha --store STORE --folder /tmp/tune-asha

Settings are random draws, which do not depend on results: both sweeps try the same ones. They train
`lowrank`, whose subspaces are found once, by a run before. What ASHA stops depends
on the order in which trials reach a rung, so the curves of the whole trials are also shown to it in many other
orders, one trial after the other; and there once more by the objective alone, with nothing to decide between equals.
Writes benchmarks/results/tune_asha.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml
from ray.tune.schedulers import TrialScheduler

from benchmarks.provenance import require_commit, save
from ray_app.commands.tune.search import make_asha
from ray_app.commands.tune.sweep_dir import SweepDir
from ray_app.runs.event_log import entries

RAY_APP = Path(sys.executable).with_name("ray-app")
FIXED = {"strategy": "lowrank", "rank": 32, "batch_size": 32}
SPACE = {
    "hidden_dim": [32, 128, 512],
    "learning_rate": {"log": [1.0e-4, 1.0e-2]},
    "weight_decay": {"log": [1.0e-3, 1.0]},
    "dropout": [0.0, 0.2, 0.4],
    "cosine_weight": {"log": [0.1, 3.0]},
}
ORDERS = 500
"""Other orders of the trials."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for the sweeps")
    parser.add_argument("--trials", type=int, default=27)
    parser.add_argument("--epochs", type=int, default=27)
    parser.add_argument("--grace", type=int, default=3)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    start = started(args.store, args.folder.resolve() / "start")
    fixed = FIXED | {"init_from": start, "num_epochs": args.epochs, "early_stop_patience": args.epochs}
    rungs = {"grace_period": args.grace, "reduction_factor": 3}
    found = {}
    for scheduler in ("none", "asha"):
        file = args.folder / f"{scheduler}.yaml"
        sweep = {"base": fixed, "space": SPACE, "search_alg": "random", "scheduler": scheduler} | rungs
        names = {"store": str(args.store.resolve()), "out": str(args.folder.resolve() / scheduler)}
        file.write_text(yaml.safe_dump(names | sweep | {"max_trials": args.trials}))
        found[scheduler] = searched(file)
    whole, asha = found["none"], found["asha"]
    assert [t["config"] for t in whole["trials"]] == [t["config"] for t in asha["trials"]], "the same settings"
    save(
        "tune_asha",
        {
            "space": SPACE,
            "base": FIXED | {"num_epochs": args.epochs},
            "rungs": rungs,
            "trials": args.trials,
            "steps": {name: steps(result) for name, result in found.items()},
            "share_of_steps": round(steps(asha) / steps(whole), 4),
            "best": {
                name: {key: value for key, value in result["best"].items() if key != "checkpoint"}
                for name, result in found.items()
            },
            "objective_lost_points": round(100 * (whole["best"]["objective"] - asha["best"]["objective"]), 3),
            "objectives_whole": sorted((t["objective"] for t in whole["trials"]), reverse=True),
            "stopped": sum(trial["status"] == "stopped" for trial in asha["trials"]),
            "other_orders": {
                "mean_cosine_between_equals": orders(args.folder, between_equals=True),
                "objective_alone": orders(args.folder, between_equals=False),
            },
        },
    )


def started(store: Path, run: Path) -> str:
    """Subspaces and means, as a run of one epoch leaves them."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FIXED.items()]
    words = ["train", f"--store={store}", f"--out={run}", "--num-epochs=1", *flags, "--json"]
    uri = f"--tracking-uri=sqlite:///{run.parent}/mlflow.db"
    subprocess.run([str(RAY_APP), *words, uri], stdout=subprocess.DEVNULL, check=True)
    return str(run / "init")


def searched(file: Path) -> dict[str, Any]:
    """Return a sweep's result."""
    uri = f"sqlite:///{file.parent.resolve()}/mlflow.db"
    words = ["tune", str(file), "--no-final", "--yes", "--json", "--tracking-uri", uri]
    done = subprocess.run([str(RAY_APP), *words], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def orders(folder: Path, *, between_equals: bool) -> dict[str, float]:
    """Share of epochs, and points lost, where ASHA sees the whole trials in other orders."""
    sweep = SweepDir((folder / "none").resolve())
    cfg = SweepDir((folder / "asha").resolve()).config
    curves, rates = [], []
    for trial in sweep.trials():
        then = list(trial.after_each_epoch(entries(sweep.run(trial.name).path), cfg.objective))
        rates.append([each.objective or 0.0 for each in then])
        curves.append([each.metrics["compared"] for each in then] if between_equals else rates[-1])
    rng, shares, lost = np.random.default_rng(0), [], []
    for _ in range(ORDERS):
        scheduler, reached, best = make_asha(cfg), 0, 0.0
        for k in rng.permutation(len(curves)):
            epochs = epochs_of(str(k), curves[k], scheduler)
            reached, best = reached + epochs, max(best, rates[k][epochs - 1])
        shares.append(reached / sum(map(len, curves)))
        lost.append(100 * (max(rate[-1] for rate in rates) - best))
    return {
        "share_mean": round(float(np.mean(shares)), 4),
        "share_worst_tenth": round(float(np.quantile(shares, 0.9)), 4),
        "at_most_40_percent": float(np.mean(np.array(shares) <= 0.4)),
        "lost_points_mean": round(float(np.mean(lost)), 3),
        "lost_at_most_half_a_point": float(np.mean(np.array(lost) <= 0.5)),
    }


def epochs_of(name: str, curve: list[float], scheduler: TrialScheduler) -> int:
    """Epochs before the scheduler stops this trial, or all."""
    trial: Any = SimpleNamespace(trial_id=name)
    controller: Any = None
    scheduler.on_trial_add(controller, trial)
    for epoch, value in enumerate(curve, 1):
        decision = scheduler.on_trial_result(controller, trial, {"epoch": epoch, "compared": value})
        if decision == TrialScheduler.STOP:
            return epoch
    return len(curve)


def steps(result: dict[str, Any]) -> int:
    """Optimizer steps of all trials."""
    return sum(trial["steps"] for trial in result["trials"])


if __name__ == "__main__":
    require_commit()
    main()

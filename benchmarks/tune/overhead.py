"""What a trial costs before its first step: 20 trials in their own processes, against a Ray Train group in each.

    python -m benchmarks.tune.overhead --store STORE --folder /tmp/tune-overhead

From the line in the sweep's event log that creates a trial, to the beginning of the first optimizer step of its run;
one trial at a time, on 2 CPUs. The same sweep runs a second time with `num_workers: 2` (half a CPU each), which
starts a `TorchTrainer` in every trial, with fewer trials; and, in processes of their own, with strategies that cost
more to begin: conv and lowrank, whose means and subspaces the sweep finds once (`before_s`: from the driver's start
to the first trial), and lightweight of hidden 512. Writes benchmarks/results/tune_overhead.json.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.provenance import require_commit, save
from ray_app.commands.tune.sweep_dir import SweepDir
from ray_app.runs.event_log import entries

RAY_APP = Path(sys.executable).with_name("ray-app")
FIXED = {"strategy": "bottleneck", "hidden_dim": 8, "num_epochs": 1, "batch_size": 8}
OTHERS: dict[str, dict[str, Any]] = {
    "conv": {"strategy": "conv", "hidden_dim": None},
    "lowrank": {"strategy": "lowrank", "hidden_dim": None, "rank": 64},
    "lightweight": {"strategy": "lightweight", "hidden_dim": 512},
}
"""What else is timed, each as `FIXED` but for these."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for the sweeps")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--groups", type=int, default=5)
    parser.add_argument("--others", type=int, default=5, help="trials of each other strategy")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    store, folder, whole = args.store.resolve(), args.folder.resolve(), {"cpus_per_worker": 2}
    _, own = measured(store, folder / "own", args.trials, whole, {})
    _, groups = measured(store, folder / "groups", args.groups, {"num_workers": 2, "cpus_per_worker": 0.5}, {})
    others = {name: measured(store, folder / name, args.others, whole, fixed) for name, fixed in OTHERS.items()}
    save(
        "tune_overhead",
        {
            "own_process": summary(own),
            "torch_trainer_in_each": summary(groups),
            "own_process_of_other_strategies": {
                name: {"before_s": round(before_s, 3), **summary(seconds)}
                for name, (before_s, seconds) in others.items()
            },
            "ratio_of_medians": round(statistics.median(groups) / statistics.median(own), 1),
        },
    )


def measured(
    store: Path, out: Path, trials: int, more: dict[str, Any], fixed: dict[str, Any]
) -> tuple[float, list[float]]:
    """Seconds before the first trial of a sweep, and of each trial in order."""
    rates = [round(1e-3 * (1 + k / 100), 6) for k in range(trials)]
    sweep = {"store": str(store), "out": str(out), "base": FIXED | fixed, "space": {"learning_rate": rates}}
    how = {"search_alg": "grid", "scheduler": "none", "max_trials": trials, "max_concurrent_trials": 1}
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(sweep | how | more))
    words = [
        "tune",
        str(file),
        "--no-final",
        "--yes",
        "--json",
        "--tracking-uri",
        f"sqlite:///{out.parent}/mlflow.db",
    ]
    subprocess.run([str(RAY_APP), *words], stdout=subprocess.DEVNULL, check=True)
    folder = SweepDir(out)
    seconds: list[float] = []
    before_s = 0.0
    for line in folder.entries():
        if line["kind"] == "run_started":
            before_s = -line["time"]
        elif line["kind"] == "trial_created":
            before_s += 0.0 if seconds else line["time"]
            first = next(x for x in entries(folder.run(line["name"]).path) if x["kind"] == "step")
            seconds.append(first["time"] - first["seconds"] - line["time"])
    return before_s, seconds


def summary(seconds: list[float]) -> dict[str, Any]:
    """Summarise seconds; the first is separate, since it starts the process that the later ones use."""
    return {
        "trials": len(seconds),
        "median_s": round(statistics.median(seconds), 3),
        "first_s": round(seconds[0], 3),
        "most_s_of_the_others": round(max(seconds[1:]), 3),
        "seconds": [round(s, 3) for s in seconds],
    }


if __name__ == "__main__":
    require_commit()
    main()

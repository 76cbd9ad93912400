"""ASHA against running every trial to its end: the same space, seeds and pairs; what it finds, and at how many steps.

    .venv/bin/python benchmarks/tune_asha.py --store STORE --folder /tmp/tune-asha

Settings are random draws, which do not depend on results: both sweeps try the same ones. They train `lowrank` in the
compressed space, where a trial takes seconds; its subspaces are found once, by a run before. Writes
benchmarks/results/tune_asha.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from provenance import save

RAY_APP = Path(sys.executable).with_name("ray-app")
FIXED = {"strategy": "lowrank", "space": "compressed", "rank": 32, "batch_size": 32}
SPACE = {
    "hidden_dim": [32, 128, 512],
    "learning_rate": {"log": [1.0e-4, 1.0e-2]},
    "weight_decay": {"log": [1.0e-3, 1.0]},
    "dropout": [0.0, 0.2, 0.4],
    "cosine_weight": {"log": [0.1, 3.0]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for the sweeps")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=27)
    parser.add_argument("--grace", type=int, default=3)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    start = started(args.store, args.folder.resolve() / "start")
    fixed = FIXED | {"start": start, "num_epochs": args.epochs, "early_stop_patience": args.epochs}
    rungs = {"grace_epochs": args.grace, "reduction_factor": 3}
    found = {}
    for scheduler in ("none", "asha"):
        file = args.folder / f"{scheduler}.yaml"
        sweep = {"fixed": fixed, "space": SPACE, "searcher": "random", "scheduler": scheduler} | rungs
        names = {"store": str(args.store.resolve()), "out": str(args.folder.resolve() / scheduler)}
        file.write_text(yaml.safe_dump(names | sweep | {"max_trials": args.trials}))
        found[scheduler] = searched(file)
    whole, asha = found["none"], found["asha"]
    assert [t["config"] for t in whole["trials"]] == [t["config"] for t in asha["trials"]], "the same settings"
    save(
        "tune_asha",
        {
            "space": SPACE,
            "fixed": FIXED | {"num_epochs": args.epochs},
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
        },
    )


def started(store: Path, run: Path) -> str:
    """Subspaces and means, as a run of one epoch leaves them."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FIXED.items()]
    words = ["train", f"--store={store}", f"--out={run}", "--num-epochs=1", *flags, "--json"]
    uri = f"--tracking-uri=sqlite:///{run.parent}/mlflow.db"
    subprocess.run([str(RAY_APP), *words, uri], stdout=subprocess.DEVNULL, check=True)
    return str(run / "start")


def searched(file: Path) -> dict[str, Any]:
    """A sweep's result."""
    uri = f"sqlite:///{file.parent.resolve()}/mlflow.db"
    words = ["tune", str(file), "--no-final", "--yes", "--json", "--tracking-uri", uri]
    done = subprocess.run([str(RAY_APP), *words], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def steps(result: dict[str, Any]) -> int:
    """Optimizer steps of all trials."""
    return sum(trial["steps"] for trial in result["trials"])


if __name__ == "__main__":
    main()

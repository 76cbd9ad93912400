"""Kill a sweep at random moments until it ends; compare it with an undisturbed one.

    python -m benchmarks.tune.chaos --folder /tmp/tune-chaos

A grid of six settings at full feature width on a small store. At each random moment one of these gets SIGKILL: a
trial's process, the driver alone, or everything with its cluster; a driver that is gone is followed by
`ray-app tune --resume`. The moments are spread over the whole sweep: one in each of as many equal parts of the steps
that the undisturbed one takes. Writes benchmarks/results/tune_chaos.json.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.provenance import require_commit, save
from benchmarks.train.chaos import title
from ray_app.commands.tune.sweep_dir import SweepDir
from ray_app.runs.event_log import entries
from ray_app.store.atomic import sha256_file

RAY_APP = Path(sys.executable).with_name("ray-app")
KINDS = ("trial", "driver", "everything")
SWEEP = {
    "base": {"strategy": "bottleneck", "num_epochs": 8, "batch_size": 8, "early_stop_patience": 8},
    "space": {"hidden_dim": [8, 16, 24], "learning_rate": [1.0e-3, 3.0e-3]},
    "search_alg": "grid",
    "scheduler": "none",
    "max_trials": 6,
}
LONGEST_S = 300.0
"""For one command to move on, before it counts as hung."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for the store and the sweeps")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    folder, rng = args.folder.resolve(), random.Random(args.seed)
    scenes = f"prepare scenes --out {folder / 'store'} --num-pairs 72 --num-sequences 6 --width 160 --height 120"
    subprocess.run([str(RAY_APP), *scenes.split(), "--json"], check=True, stdout=subprocess.DEVNULL)
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({"store": str(folder / "store"), "out": "-", **SWEEP}))
    subprocess.run(words(file, folder / "clean"), check=True, stdout=subprocess.DEVNULL)
    clean = outcome_of(folder / "clean")
    part = steps(folder / "clean") / args.kills
    moments = [int(part * (n + rng.random())) for n in range(args.kills)]
    killed, starts = disturbed(file, folder / "killed", moments, rng)
    found = outcome_of(folder / "killed")
    save(
        "tune_chaos",
        {
            "sweep": SWEEP,
            "pairs": 72,
            "width": 150_528,
            "kills": len(killed),
            "kills_by_kind": Counter(kind for kind, *_ in killed),
            "killed_at": [{"kind": kind, "step": step, "trials_started": trials} for kind, step, trials in killed],
            "starts": starts,
            "clean": clean,
            "killed": found,
            "same_finished_trials": set(clean["finished"]) == set(found["finished"]),
            "same_weights_of_every_trial": clean["weights"] == found["weights"],
            "same_winner": clean["winner"] == found["winner"],
            "trials_run_to_the_end_twice": sum(count > 1 for count in found["ends"].values()),
        },
    )


def words(file: Path, out: Path) -> list[str]:
    """Return the command that starts a sweep, or resumes it."""
    uri = f"sqlite:///{file.parent}/mlflow.db"
    begin = ["--resume", str(out)] if (out / "events.jsonl").is_file() else [str(file), "--out", str(out)]
    return [str(RAY_APP), "tune", *begin, "--no-final", "--yes", "--json", "--tracking-uri", uri]


def outcome_of(sweep: Path) -> dict[str, Any]:
    """Return the outcome of a sweep."""
    folder = SweepDir(sweep)
    trials = [trial for trial in folder.trials() if trial.status == "finished"]
    runs = {trial.name: folder.run(trial.name) for trial in trials}
    best = min(trials, key=lambda trial: trial.rank)
    weights = {name: run.path / kept for name, run in runs.items() if (kept := run.best_on_disk)}
    return {
        "finished": sorted(runs),
        "winner": best.name,
        "objective": best.objective,
        "weights": {name: sha256_file(path / "model.safetensors") for name, path in weights.items()},
        "ends": {name: sum(line["kind"] == "run_ended" for line in entries(run.path)) for name, run in runs.items()},
        "attempts": {
            name: sum(x["kind"] == "workers_started" for x in entries(run.path)) for name, run in runs.items()
        },
        "objectives": {trial.name: trial.objective for trial in trials},
    }


Killed = tuple[str, int, int]
"""What was killed, after how many steps of all trials, and how many of them had started."""


def disturbed(file: Path, sweep: Path, moments: list[int], rng: random.Random) -> tuple[list[Killed], int]:
    """Run the sweep, killed after so many steps of all trials each time; return how often a driver was started."""
    killed: list[Killed] = []
    starts = 0
    while True:
        process = subprocess.Popen(words(file, sweep), stdout=subprocess.DEVNULL, start_new_session=True)
        starts += 1
        while process.poll() is None and len(killed) < len(moments):
            if not wait_for_growth(process, sweep):
                break
            if (at := steps(sweep)) < moments[len(killed)]:
                continue
            kind = KINDS[len(killed) % len(KINDS)]
            if process.poll() is None and kill(process, kind, rng):
                killed.append((kind, at, len(list(sweep.glob("trials/*/events.jsonl")))))
                print(f"killed {kind} at step {at}", file=sys.stderr, flush=True)
        if process.wait(timeout=LONGEST_S) == 0:
            return killed, starts
        print("the driver is gone: resuming", file=sys.stderr, flush=True)


def steps(sweep: Path) -> int:
    """Count the optimizer steps that its trials have logged; repeated steps are not logged again."""
    runs = [path.parent for path in sweep.glob("trials/*/events.jsonl")]
    return sum(line["kind"] == "step" for run in runs for line in entries(run))


def size(sweep: Path) -> int:
    """Bytes of all event logs."""
    with contextlib.suppress(FileNotFoundError):
        return sum(path.stat().st_size for path in sweep.rglob("events.jsonl"))
    return 0


def wait_for_growth(process: "subprocess.Popen[bytes]", sweep: Path) -> bool:
    """Wait for the next logged line; False if the process ends first."""
    before, deadline = size(sweep), time.monotonic() + LONGEST_S
    while process.poll() is None:
        assert time.monotonic() < deadline, "nothing moves any more"
        if size(sweep) > before:
            return True
        time.sleep(0.01)
    return False


def kill(process: "subprocess.Popen[bytes]", kind: str, rng: random.Random) -> bool:
    """SIGKILL to processes of this kind; False where there is none at the moment."""
    children = psutil.Process(process.pid).children(recursive=True)
    trials = [child for child in children if "ImplicitFunc" in title(child)]
    if kind == "trial":
        victims = rng.sample(trials, min(len(trials), 1))
    else:
        # Ray's processes end by themselves when their driver is gone, a little later.
        victims = [psutil.Process(process.pid), *(children if kind == "everything" else [])]
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            os.kill(victim.pid, signal.SIGKILL)
    return bool(victims)


if __name__ == "__main__":
    require_commit()
    main()

"""Training under kills, compared byte for byte with an undisturbed run.

    python -m benchmarks.train.chaos --folder /tmp/chaos [--kills 24]

A store of full-width scene pairs is prepared, a clean run is trained, and then runs of the same settings are killed
with SIGKILL at random moments: any worker, the worker that saves, Ray Train's controller, or everything with its
cluster. A run that ended is resumed by `ray-app train --resume`. Checkpoints come after each epoch and
within it. Writes benchmarks/results/chaos.json.
"""

import argparse
import contextlib
import json
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

from benchmarks.provenance import require_commit, save
from ray_app.runs.event_log import EVENT_LOG, entries
from ray_app.store.atomic import sha256_file

RAY_APP = Path(sys.executable).with_name("ray-app")
KINDS = ("worker", "saving worker", "controller", "everything")
FLAGS = "--strategy lightweight --hidden-dim 16 --batch-size 8 --num-epochs 40 --early-stop-patience 40"
FLAGS += " --num-workers 2 --checkpoint-every 3"
LONGEST_S = 300.0
"""For one command to move on, before it counts as hung."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for the store and the runs")
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--kills-per-run", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    folder, rng = args.folder.resolve(), random.Random(args.seed)
    store = folder / "store"
    scenes = f"prepare scenes --out {store} --num-pairs 72 --num-sequences 6 --width 160 --height 120"
    subprocess.run([str(RAY_APP), *scenes.split(), "--json"], check=True, stdout=subprocess.DEVNULL)
    train = ["train", "--store", str(store), *FLAGS.split(), "--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    clean = finished(train, folder / "clean")
    kinds = [KINDS[n % len(KINDS)] for n in range(args.kills)]
    runs = [
        disturbed(train, folder / f"run-{first}", kinds[first : first + args.kills_per_run], clean, rng)
        for first in range(0, args.kills, args.kills_per_run)
    ]
    done = [kind for run in runs for kind in run["killed"]]
    save(
        "chaos",
        {
            "flags": FLAGS,
            "pairs": 72,
            "width": 150_528,
            "clean": clean,
            "kills": len(done),
            "kills_by_kind": Counter(done),
            "runs": runs,
            "all_weights_equal": all(run["model_sha256"] == clean["model_sha256"] for run in runs),
            "steps_lost_or_logged_twice": sum(run["steps_lost_or_logged_twice"] for run in runs),
            "pairs_lost_or_seen_twice": sum(run["pairs_lost_or_seen_twice"] for run in runs),
        },
    )


def finished(train: list[str], run: Path) -> dict[str, Any]:
    """Train once without kills."""
    subprocess.run([str(RAY_APP), *train, "--out", str(run)], check=True, stdout=subprocess.DEVNULL)
    return outcome_of(run)


def outcome_of(run: Path) -> dict[str, Any]:
    """Return the outcome of a run."""
    lines = entries(run)
    epochs = [line for line in lines if line["kind"] == "epoch"]
    best = json.loads((run / "best.json").read_text())["checkpoint"]
    return {
        "model_sha256": sha256_file(run / best / "model.safetensors"),
        "newest_sha256": sha256_file(run / "checkpoints" / f"epoch_{epochs[-1]['epoch']:04d}" / "model.safetensors"),
        "epochs": len(epochs),
        "steps": epochs[-1]["global_step"],
        "pairs_by_epoch": [line["train"]["pairs"] for line in epochs],
    }


def disturbed(
    train: list[str], run: Path, kinds: list[str], clean: dict[str, Any], rng: random.Random
) -> dict[str, Any]:
    """Kill a run once for each kind, and resume it until it ends."""
    waiting, killed, starts = list(kinds), [], 0
    began = time.monotonic()
    while True:
        words = ["--resume", str(run)] if (run / EVENT_LOG).is_file() else [*train[1:], "--out", str(run)]
        process = subprocess.Popen([str(RAY_APP), "train", *words], stdout=subprocess.DEVNULL, start_new_session=True)
        starts += 1
        while process.poll() is None and waiting:
            # From a random moment after the next sign of life: before, in and after steps and saves.
            if not wait_for_growth(process, run / EVENT_LOG):
                break
            time.sleep(rng.uniform(0.0, 1.5))
            if process.poll() is None and kill(process, waiting[0], run / EVENT_LOG, rng):
                killed.append(waiting.pop(0))
                print(f"{run.name}: killed {killed[-1]}", file=sys.stderr, flush=True)
        code = process.wait(timeout=LONGEST_S)
        if code == 0:
            break
        print(f"{run.name}: ended with code {code}, resuming", file=sys.stderr, flush=True)
    found = outcome_of(run)
    steps = Counter(line["global_step"] for line in entries(run) if line["kind"] == "step")
    wanted = set(range(1, clean["steps"] + 1))
    return {
        **found,
        "killed": killed,
        "starts": starts,
        "restarts_by_ray": sum(line["kind"] == "workers_started" for line in entries(run)) - starts,
        "equal": found["model_sha256"] == clean["model_sha256"] and found["newest_sha256"] == clean["newest_sha256"],
        "steps_lost_or_logged_twice": len(wanted ^ set(steps)) + sum(n - 1 for n in steps.values()),
        "pairs_lost_or_seen_twice": sum(
            abs(a - b) for a, b in zip(found["pairs_by_epoch"], clean["pairs_by_epoch"], strict=True)
        ),
        "seconds": round(time.monotonic() - began, 1),
    }


def wait_for_growth(process: "subprocess.Popen[bytes]", log: Path) -> bool:
    """Wait for the next logged step or epoch; False if the process ends first."""
    size = log.stat().st_size if log.is_file() else 0
    deadline = time.monotonic() + LONGEST_S
    while process.poll() is None:
        assert time.monotonic() < deadline, "nothing moves any more"
        if log.is_file() and b'"kind": "step"' in log.read_bytes()[size:]:
            return True
        time.sleep(0.01)
    return False


def kill(process: "subprocess.Popen[bytes]", kind: str, log: Path, rng: random.Random) -> bool:
    """SIGKILL to processes of this kind; False where there is none at the moment."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    if kind == "everything":
        victims = tree
    elif kind == "controller":
        victims = [p for p in tree if "TrainController" in title(p)]
    else:
        victims = [p for p in tree if "RayTrainWorker" in title(p)]
        if kind == "saving worker":
            victims = [p for p in victims if holds(p, log)]
        victims = rng.sample(victims, min(len(victims), 1))
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            os.kill(victim.pid, signal.SIGKILL)
    return bool(victims)


def title(process: psutil.Process) -> str:
    """Ray sets it to the actor's class and method."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def holds(process: psutil.Process, file: Path) -> bool:
    """Whether the process has the file open."""
    try:
        return any(Path(opened.path) == file for opened in process.open_files())
    except psutil.Error:
        return False


if __name__ == "__main__":
    require_commit()
    main()

"""Nodes that die and come under a training of 1 to 3 workers, compared with an undisturbed run.

    python -m benchmarks.train.elastic --folder /tmp/train-elastic [--kills 10]

Three raylets of one CPU each on this machine; the driver is at the first. A raylet is killed with SIGKILL at a random
moment, one is added once training continues with fewer, the next is killed once it has grown. A run that ends is
followed by another one until the kills are done; each is compared with an undisturbed run of one worker. Time to
continue: from the kill to the first step that the run had not come to before.
Writes benchmarks/results/train_elastic.json after each run. A store and an undisturbed run that are there are taken.
With --add the runs of the result file that is there count towards the kills, and stay in it with their own date.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}

from ray.cluster_utils import Cluster

from benchmarks.provenance import RESULTS, provenance, require_commit, save
from benchmarks.train.chaos import outcome_of
from ray_app.runs.event_log import EVENT_LOG, entries

RAY_APP = Path(sys.executable).with_name("ray-app")
SCENES = "--num-pairs 72 --num-sequences 6 --width 160 --height 120"
FLAGS = "--strategy lightweight --hidden-dim 16 --batch-size 8 --num-epochs 60"
FLAGS += " --early-stop-patience 60 --checkpoint-every 3"
ELASTIC = "--num-workers 1:3 --elastic-check-interval-s 2 --max-failures 2"
NODE = {"num_cpus": 1, "object_store_memory": 300 * 2**20}
LONGEST_S = 300.0
"""For a run to move on, before it counts as hung."""
TOLERANCE = 1e-4
"""Of validation loss and mean cosine: the same sums in another order."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the store and the runs")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--add", action="store_true", help="to the runs of the result file")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    folder, rng = args.folder.resolve(), random.Random(args.seed)
    train = f"train --store {folder}/store {FLAGS} --tracking-uri sqlite:///{folder}/mlflow.db --json"
    if not (folder / "clean").exists():
        scenes = f"prepare scenes --out {folder}/store {SCENES} --json"
        for words in (scenes, f"{train} --out {folder}/clean"):
            subprocess.run([str(RAY_APP), *words.split()], check=True, stdout=subprocess.DEVNULL)
    clean = ended(folder / "clean")
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": True})
    runs = earlier(clean) if args.add else []
    try:
        while (kills := sum(len(run["seconds_to_continue"]) for run in runs)) < args.kills:
            out = folder / f"run-{args.seed}-{len(runs)}"
            words = f"{train} {ELASTIC} --address {cluster.address} --out {out}"
            runs.append(disturbed(cluster, words.split(), out, args.kills - kills, rng))
            runs[-1] |= {"right": runs[-1]["code"] == 0 and same(ended(out), clean), **when(provenance())}
            tell(runs, clean)
    finally:
        cluster.shutdown()


def earlier(clean: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the runs of the result file, if they were held against the same undisturbed run."""
    found = json.loads((RESULTS / "train_elastic.json").read_text())
    assert found["flags"] == f"{FLAGS} {ELASTIC}", "the result file is of other flags"
    assert found["clean"] == clean, "the result file is of another undisturbed run"
    return [{**when(found["provenance"]), **run} for run in found["runs"]]


def when(about: dict[str, Any]) -> dict[str, Any]:
    """Of a run: date, commit and the machine's load before it."""
    return {name: about[name] for name in ("date", "commit", "load_at_start")}


def tell(runs: list[dict[str, Any]], clean: dict[str, Any]) -> None:
    """Write the result of the runs so far."""
    save(
        "train_elastic",
        {
            "flags": f"{FLAGS} {ELASTIC}",
            "pairs": 72,
            "width": 150_528,
            "clean": clean,
            "kills": sum(len(run["seconds_to_continue"]) for run in runs),
            "jobs": len(runs),
            "jobs_ended_wrong": sum(not run["right"] for run in runs),
            **{
                name: {"median": statistics.median(times), "worst": max(times)}
                for name in ("seconds_to_continue", "seconds_to_grow")
                if (times := [seconds for run in runs for seconds in run[name]])
            },
            "runs": runs,
        },
    )


def ended(run: Path) -> dict[str, Any]:
    """Return what a run ended with; each step line is counted."""
    lines = entries(run)
    (*_, last) = (line for line in lines if line["kind"] == "epoch")
    steps = [line["global_step"] for line in lines if line["kind"] == "step"]
    numbers = {"val_loss": last["val"]["loss"], "val_cos_sim": last["val"]["cos_sim_mean"]}
    return {**outcome_of(run), **numbers, "each_step_logged_once": steps == list(range(1, last["global_step"] + 1))}


def same(found: dict[str, Any], clean: dict[str, Any]) -> bool:
    """Return True if every step and pair is there once, with the numbers of the undisturbed run."""
    exact = ("epochs", "steps", "pairs_by_epoch", "each_step_logged_once")
    close = all(abs(found[name] - clean[name]) < TOLERANCE for name in ("val_loss", "val_cos_sim"))
    return close and all(found[name] == clean[name] for name in exact)


def disturbed(cluster: Cluster, words: list[str], run: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Train while nodes go and come, until the run ends or so many have gone."""
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(**NODE)
    process = subprocess.Popen([str(RAY_APP), *words], stdout=subprocess.DEVNULL)
    continued: list[float] = []
    grew: list[float] = []
    while len(continued) < kills and wait(process, run, lambda steps: steps[-1]["workers"] == 3):
        time.sleep(rng.uniform(0.0, 4.0))
        if process.poll() is not None:
            break
        killed_at = time.time()
        cluster.remove_node(rng.choice(sorted(cluster.worker_nodes, key=str)), allow_graceful=False)
        if not wait(process, run, lambda steps: steps[-1]["workers"] < 3):
            break  # it ended; its exit code says how
        (first, *_) = (line for line in steps_of(run) if line["time"] > killed_at and line["workers"] < 3)
        continued.append(round(first["time"] - killed_at, 1))
        added_at = time.time()
        cluster.add_node(**NODE)
        if wait(process, run, lambda steps: steps[-1]["workers"] == 3):
            grew.append(round(time.time() - added_at, 1))
        print(f"{run.name}: on after {continued[-1]} s, grown after {grew[-1:]} s", file=sys.stderr, flush=True)
    code = process.wait(timeout=LONGEST_S)
    return {"code": code, "seconds_to_continue": continued, "seconds_to_grow": grew}


def steps_of(run: Path) -> list[dict[str, Any]]:
    """Return the steps of a run so far."""
    return [line for line in entries(run) if line["kind"] == "step"] if (run / EVENT_LOG).is_file() else []


def wait(process: "subprocess.Popen[bytes]", run: Path, holds: Any) -> bool:
    """Until the steps of a run say so; False when the process ends before."""
    deadline = time.monotonic() + LONGEST_S
    while process.poll() is None:
        assert time.monotonic() < deadline, "nothing moves any more"
        if (steps := steps_of(run)) and holds(steps):
            return True
        time.sleep(0.1)
    return False


if __name__ == "__main__":
    require_commit()
    main()

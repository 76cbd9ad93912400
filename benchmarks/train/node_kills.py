"""Nodes that die under prepare, tune and serve: what ended wrong, what was lost, how long until work continued.

    python -m benchmarks.train.node_kills prepare --folder /tmp/node-kills
    python -m benchmarks.train.node_kills tune --folder /tmp/node-kills
    python -m benchmarks.train.node_kills serve --folder /tmp/node-kills

Three raylets on this machine: a head without CPUs and two workers. At a random moment all processes of one raylet get
SIGKILL, and a new node comes. `prepare` and `tune` are the real commands against RAY_ADDRESS, over and over until so
many nodes have died; their outcome is compared with an undisturbed run. `serve` is the endpoint with a
replica on each worker, behind HAProxy as on a cluster, asked without pause through `ray_app.client`. Raylets of one
machine share its address, disk and cores: this says nothing of networks.
Writes benchmarks/results/node_kills_PART.json.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from cluster_endpoint import behind_haproxy, cluster_endpoint, replicas
from numpy_source import NumpySource, build_store
from three_nodes import Nodes, three_nodes

from benchmarks.provenance import require_commit, save
from benchmarks.serve.process import checkpoint_of
from benchmarks.serve.traffic import quantiles_ms
from ray_app.client import AlignmentClient
from ray_app.commands.tune.sweep_dir import SweepDir
from ray_app.errors import RayAppError
from ray_app.runs.event_log import entries
from ray_app.store.atomic import sha256_file
from ray_app.store.pair_store import PairStore

RAY_APP = Path(sys.executable).with_name("ray-app")
SCENES = "--num-pairs 96 --num-sequences 24 --width 160 --height 120"
SWEEP = {
    "base": {"strategy": "bottleneck", "num_epochs": 80, "batch_size": 8, "early_stop_patience": 80},
    "space": {"hidden_dim": [8, 16, 24], "learning_rate": [1.0e-3, 3.0e-3]},
    "search_alg": "grid",
    "scheduler": "none",
    "max_trials": 6,
}
WIDTH, HIDDEN, CALLERS = 4096, 512, 4
LONGEST_S = 240.0
"""Time without progress after which a command counts as hung."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--folder", type=Path, required=True, help="for stores and sweeps; a new one is made in it")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = args.folder.resolve() / f"{args.part}-{args.seed}"
    folder.mkdir(parents=True)
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
    with behind_haproxy() as environment, three_nodes(environment if args.part == "serve" else {}) as nodes:
        found = PARTS[args.part](nodes, folder, args.kills, random.Random(args.seed))
    save(f"node_kills_{args.part}", {"raylets": 3, "cpus_per_worker_node": 1, **found})


def prepare(nodes: Nodes, folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kills between a run's first finished file and its last."""
    wait(command(nodes, f"prepare scenes --out {folder / 'clean'} {SCENES}"))
    clean = outcome_of_store(folder / "clean")
    took: list[float | None] = []
    wrong = lost = doubled = runs = 0
    seconds = []
    while len(took) < kills:
        runs += 1
        out = folder / str(runs)
        began = time.monotonic()
        process = command(nodes, f"prepare scenes --out {out} {SCENES}")
        grow(process, lambda out=out: finished_tasks(out))
        while len(took) < kills and process.poll() is None:
            time.sleep(rng.uniform(0.0, 4.0))
            if process.poll() is not None or finished_tasks(out) >= clean["files"] - 2:
                break
            took.append(killed(nodes, process, lambda out=out: finished_tasks(out), rng))
        code = wait(process)
        seconds.append(round(time.monotonic() - began, 1))
        found = outcome_of_store(out) if code == 0 else None
        wrong += found is None or found["files_sha256"] != clean["files_sha256"]
        if found:
            lost += len(set(clean["ids"]) - set(found["ids"]))
            doubled += sum(count - 1 for count in Counter(found["ids"]).values())
    return {
        "command": f"ray-app prepare scenes {SCENES}",
        "runs": runs,
        "seconds_of_runs": seconds,
        "jobs_that_ended_wrong": wrong,
        "pairs_in_each": len(clean["ids"]),
        "pairs_lost": lost,
        "pairs_doubled": doubled,
        **summary("seconds_until_another_file_is_finished", took),
    }


def outcome_of_store(store: Path) -> dict[str, Any]:
    """Return what a store holds, byte for byte."""
    opened = PairStore.open(store)
    return {
        "files": len(opened.manifest.files),
        "files_sha256": {file.name: sha256_file(store / file.name) for file in opened.manifest.files},
        "ids": opened.index.sample_id.tolist(),
    }


def finished_tasks(out: Path) -> int:
    """Files that are finished; those of a published store are all."""
    return len(list(out.glob("*.parquet"))) if out.is_dir() else 0


def tune(nodes: Nodes, folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill nodes while trials run, until a trial restarts each time. A kill that met no trial is not counted."""
    store = build_store(NumpySource(), folder / "store")
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({"store": str(store), "out": "-", **SWEEP}))
    words = f"tune {file} --no-final --yes --tracking-uri sqlite:///{folder}/mlflow.db --out"
    wait(command(nodes, f"{words} {folder / 'clean'}"))
    clean = outcome_of_sweep(folder / "clean")
    took: list[float | None] = []
    wrong = runs = 0
    deaths = []
    while met(took) < kills:
        runs += 1
        out = folder / str(runs)
        process = command(nodes, f"{words} {out}")
        grow(process, lambda out=out: steps(out))
        while met(took) < kills and process.poll() is None:
            time.sleep(rng.uniform(0.0, 6.0))
            if process.poll() is not None:
                break
            took.append(killed(nodes, process, lambda out=out: restarts(out), rng))
        found = outcome_of_sweep(out) if wait(process) == 0 else None
        wrong += found is None or found != clean
        deaths.append(restarts(out))
    return {
        "sweep": SWEEP,
        "runs": runs,
        "jobs_that_ended_wrong": wrong,
        "trials_restarted_by_run": deaths,
        "trials_in_each": len(clean["objectives"]),
        **summary("seconds_until_a_lost_trial_restarts", took),
    }


def outcome_of_sweep(sweep: Path) -> dict[str, Any]:
    """Return the winner, every trial's objective, and the digests of the weights that the sweep keeps."""
    folder = SweepDir(sweep)
    trials = [trial for trial in folder.trials() if trial.status == "finished"]
    bests = {trial.name: folder.run(trial.name).best() for trial in trials}
    return {
        "winner": min(trials, key=lambda trial: trial.rank).name,
        "objectives": {trial.name: trial.objective for trial in trials},
        "weights": {
            name: sha256_file(best / "model.safetensors") for name, best in bests.items() if best and best.is_dir()
        },
    }


def steps(sweep: Path) -> int:
    """Count the epochs that trials have logged."""
    return sum(line["kind"] == "epoch" for run in trial_folders(sweep) for line in entries(run))


def restarts(sweep: Path) -> int:
    """Return the attempts beyond each trial's first."""
    counts = [sum(line["kind"] == "workers_started" for line in entries(run)) for run in trial_folders(sweep)]
    return sum(max(count - 1, 0) for count in counts)


def trial_folders(sweep: Path) -> list[Path]:
    return [path.parent for path in sweep.glob("trials/*/events.jsonl")]


def serve(nodes: Nodes, folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill nodes under callers; work continues when both replicas answer again."""
    failures: list[str] = []
    answered: list[float] = []
    stop = threading.Event()
    event = np.random.default_rng(0).integers(1, 256, (1, WIDTH), dtype=np.uint8)

    def ask(client: AlignmentClient) -> None:
        while not stop.is_set():
            began = time.perf_counter()
            try:
                client.align(event)
            except RayAppError as error:
                failures.append(str(error))
            answered.append(time.perf_counter() - began)
            time.sleep(0.02)  # the callers share two cores with what they ask

    with cluster_endpoint(nodes, checkpoint_of(folder / "checkpoint", WIDTH, HIDDEN), folder) as url:
        clients = [AlignmentClient(url, timeout_s=30.0) for _ in range(CALLERS)]
        threads = [threading.Thread(target=ask, args=(client,), daemon=True) for client in clients]
        for thread in threads:
            thread.start()
        took: list[float] = []
        for _ in range(kills):
            time.sleep(rng.uniform(1.0, 5.0))
            began = time.monotonic()
            nodes.kill(rng)
            nodes.add()
            while replicas(url) < 2:
                assert time.monotonic() - began < LONGEST_S, "the second replica does not come back"
                time.sleep(0.2)
            took.append(time.monotonic() - began)
            print(
                f"serve: {len(took)} nodes, {took[-1]:.1f} s, {len(failures)} failures", file=sys.stderr, flush=True
            )
        stop.set()
        for thread in threads:
            thread.join()
    return {
        "width": WIDTH,
        "replicas": 2,
        "proxy": "HAProxy",
        "requests": len(answered),
        "failed_through_the_client": len(failures),
        "what_failed": failures[:5],
        "sent_again": sum(client.retries for client in clients),
        "latency": quantiles_ms(answered),
        "slowest_answer_s": round(max(answered), 2),
        **summary("seconds_until_both_replicas_answer", took),
    }


def command(nodes: Nodes, words: str) -> "subprocess.Popen[bytes]":
    """`ray-app WORDS` on the cluster."""
    environment = {**os.environ, "RAY_ADDRESS": nodes.address}
    return subprocess.Popen([str(RAY_APP), *words.split(), "--json"], env=environment, stdout=subprocess.DEVNULL)


def killed(nodes: Nodes, process: "subprocess.Popen[bytes]", sign: Any, rng: random.Random) -> float | None:
    """Kill a node, add one, and return the seconds until `sign` grows; None if the command ended first."""
    nodes.kill(rng)
    began, before = time.monotonic(), sign()
    nodes.add()
    grow(process, sign, before)
    seconds = time.monotonic() - began if sign() > before else None
    print(f"killed a node, {seconds} s", file=sys.stderr, flush=True)
    return seconds


def met(seconds: Sequence[float | None]) -> int:
    """Return the number of kills that interrupted something."""
    return sum(took is not None for took in seconds)


def grow(process: "subprocess.Popen[bytes]", sign: Any, before: int = 0) -> None:
    """Until a count is larger than it was, or the command has ended."""
    until = time.monotonic() + LONGEST_S
    while process.poll() is None and sign() <= before:
        assert time.monotonic() < until, "nothing moves any more"
        time.sleep(0.05)


def wait(process: "subprocess.Popen[bytes]") -> int:
    """Its exit code."""
    return process.wait(timeout=2 * LONGEST_S)


def summary(name: str, seconds: Sequence[float | None]) -> dict[str, Any]:
    """Kills, median and worst."""
    rounded = [round(s, 1) for s in seconds if s is not None]
    return {
        "nodes_killed": len(seconds),
        "of_them_with_nothing_left_to_do": len(seconds) - met(seconds),
        name: rounded,
        "median_s": round(statistics.median(rounded), 1),
        "worst_s": max(rounded),
    }


PARTS = {"prepare": prepare, "tune": tune, "serve": serve}


if __name__ == "__main__":
    require_commit()
    main()

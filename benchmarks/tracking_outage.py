"""A tracking server that is away: does training wait for it, and is any point lost?

    .venv/bin/python benchmarks/tracking_outage.py --folder /tmp/outage --store STORE

The same run three ways, in turn, against a real `mlflow server`: up all the time; killed with SIGKILL in mid-run and
started again 60 s later; never there. Compared is the median step after the first epoch, as a ratio in one round.
Then each run is synced, twice. Writes benchmarks/results/tracking_outage.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from provenance import save

from ray_app.jobs.journal import JOURNAL, entries

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from mlflow_process import MlflowServer, free_port

RAY_APP = Path(sys.executable).with_name("ray-app")
FLAGS = "--hidden-dim 64 --batch-size 32 --early-stop-patience 1000"
AWAY_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for the runs")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    server = MlflowServer(args.folder.resolve())
    nowhere = f"http://127.0.0.1:{free_port()}"
    server.start()
    rounds: list[dict[str, Any]] = []
    try:
        for number in range(args.rounds):
            steady = trained(args, f"steady-{number}", server.uri)
            run = args.folder / f"cut-{number}"
            cutter = threading.Thread(target=cut, args=(server, run))
            cutter.start()
            cut_off = trained(args, run.name, server.uri)
            cutter.join()
            never = trained(args, f"never-{number}", nowhere)
            synced = [
                sync(args.folder / f"{name}-{number}", server.uri)
                for name in ("steady", "cut", "never")
                for _ in range(2)
            ]
            rounds.append(
                {
                    "step_ms": {"steady": steady, "cut": cut_off, "never": never},
                    "ratio_cut": round(cut_off / steady, 4),
                    "ratio_never": round(never / steady, 4),
                    "missing_after_sync": sum(result["missing"] for result in synced),
                    "surplus_after_sync": sum(result["surplus"] for result in synced),
                    "sent_by_second_sync": sum(result["points_sent"] for result in synced[1::2]),
                    "points": [result["points_journal"] for result in synced[::2]],
                }
            )
    finally:
        server.kill()
    save(
        "tracking_outage",
        {
            "flags": FLAGS,
            "away_s": AWAY_S,
            "rounds": rounds,
            "ratio_cut": statistics.median(r["ratio_cut"] for r in rounds),
            "ratio_never": statistics.median(r["ratio_never"] for r in rounds),
            "missing_after_sync": sum(r["missing_after_sync"] for r in rounds),
            "wanted": "ratios at most 1.01, nothing missing",
        },
    )


def trained(args: argparse.Namespace, name: str, uri: str) -> float:
    """Median step after the first epoch, in ms."""
    run = args.folder / name
    flags = ["--store", args.store, "--out", run, "--num-epochs", args.epochs, *FLAGS.split()]
    command = [str(RAY_APP), "train", *map(str, flags), "--tracking-uri", uri, "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    later = [line for line in entries(run) if line["kind"] == "step" and line["epoch"] > 1]
    steps = [b["seconds"] - a["seconds"] for a, b in pairwise(later) if a["epoch"] == b["epoch"]]
    return round(1e3 * statistics.median(steps), 3)


def cut(server: MlflowServer, run: Path) -> None:
    """Takes the server away for a minute once the run trains."""
    while not (run / JOURNAL).is_file() or not any(line["kind"] == "epoch" for line in entries(run)):
        time.sleep(0.2)
    server.kill()
    time.sleep(AWAY_S)
    server.start()


def sync(run: Path, uri: str) -> dict[str, Any]:
    """`ray-app sync`."""
    done = subprocess.run(
        [str(RAY_APP), "sync", str(run), "--tracking-uri", uri, "--json"], check=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()

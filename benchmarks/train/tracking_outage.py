"""A tracking server that is away: the time that training loses, and the points.

    python -m benchmarks.train.tracking_outage --folder /tmp/outage --store STORE

The same run three ways, in turn, against a real `mlflow server`: up all the time; killed with SIGKILL in mid-run and
started again 60 s later; never there. Compared is the lower quartile of the steps after the first epoch, as a ratio
in one round; on a machine with other work that ratio says little. What a step does for tracking is one line in the
event log, and nothing else: its time is measured apart, and that is the delay. Then each run is synced, twice. Writes
benchmarks/results/tracking_outage.json.
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

from mlflow_process import MlflowServer, free_port, missing_and_extra

from benchmarks.provenance import require_commit, save
from ray_app.runs.event_log import EVENT_LOG, EventLog, entries

RAY_APP = Path(sys.executable).with_name("ray-app")
FLAGS = "--strategy lightweight --hidden-dim 64 --batch-size 32 --early-stop-patience 1000"
AWAY_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for the runs")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=35)
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
            compared = [missing_and_extra(Path(one["run"]), server.uri, one["mlflow_run_id"]) for one in synced[::2]]
            rounds.append(
                {
                    "step_ms": {"steady": steady, "cut": cut_off, "never": never},
                    "ratio_cut": round(cut_off / steady, 4),
                    "ratio_never": round(never / steady, 4),
                    "missing_after_sync": sum(missing for missing, _ in compared),
                    "extra_after_sync": sum(extra for _, extra in compared),
                    "sent_by_second_sync": sum(result["points_sent"] for result in synced[1::2]),
                    "points": [result["points_in_log"] for result in synced[::2]],
                }
            )
    finally:
        server.kill()
    line_us_median, fastest_ms = line_us(args.folder / "line"), min(min(r["step_ms"].values()) for r in rounds)
    save(
        "tracking_outage",
        {
            "flags": FLAGS,
            "away_s": AWAY_S,
            "event_log_line_us": round(line_us_median, 1),
            "event_log_line_share_of_step": round(line_us_median / 1e3 / fastest_ms, 6),
            "rounds": rounds,
            "ratio_cut": statistics.median(r["ratio_cut"] for r in rounds),
            "ratio_never": statistics.median(r["ratio_never"] for r in rounds),
            "missing_after_sync": sum(r["missing_after_sync"] for r in rounds),
            "wanted": "steps delayed by less than 1 %, nothing missing",
        },
    )


def trained(args: argparse.Namespace, name: str, uri: str) -> float:
    """Lower quartile of the steps after the first epoch, in ms."""
    run = args.folder / name
    flags = ["--store", args.store, "--out", run, "--num-epochs", args.epochs, *FLAGS.split()]
    command = [str(RAY_APP), "train", *map(str, flags), "--tracking-uri", uri, "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    later = [line for line in entries(run) if line["kind"] == "step" and line["epoch"] > 1]
    steps = [b["seconds"] - a["seconds"] for a, b in pairwise(later) if a["epoch"] == b["epoch"]]
    return round(1e3 * statistics.quantiles(steps, n=4)[0], 3)


def line_us(folder: Path, lines: int = 20_000) -> float:
    """Time of one event log line, in µs."""
    folder.mkdir()
    with EventLog(folder) as log:
        began = time.perf_counter()
        for step in range(1, lines + 1):
            log.step(step, loss=0.1 / step, cos_sim=0.5, grad_norm=1.0, epoch=1, pairs=32 * step, seconds=0.1 * step)
        return 1e6 * (time.perf_counter() - began) / lines


def cut(server: MlflowServer, run: Path) -> None:
    """Take the server away for a minute once the run trains."""
    while not (run / EVENT_LOG).is_file() or not any(line["kind"] == "epoch" for line in entries(run)):
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
    require_commit()
    main()

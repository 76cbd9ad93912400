"""From `ray-app submit -- train …` to the first training step, and how much travels.

    python -m benchmarks.train.submit_time --folder /tmp/submit-time

A Ray head with its dashboard and token authentication is started on this machine, and the same small training is
submitted to it three times. The first is cold for this head: nothing has been uploaded, no worker process exists
ready. The system's caches are what they are. Writes benchmarks/results/submit_time.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from numpy_source import NumpySource, build_store
from ray_head import Head, ray_head

from benchmarks.provenance import require_commit, save
from ray_app.runs.event_log import entries

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "--strategy lightweight --hidden-dim 16 --batch-size 8 --num-epochs 1"
JOBS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for the store and the runs")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    folder = args.folder.resolve()
    store = build_store(NumpySource(), folder / "store")
    with tempfile.TemporaryDirectory(prefix="ra") as scratch, ray_head(Path(scratch)) as head:
        jobs = [submitted(head, store, folder / f"run-{n}") for n in range(JOBS)]
    save(
        "submit_time",
        {
            "flags": FLAGS,
            "uploaded_bytes": jobs[0]["uploaded_bytes"],
            "uploaded_mib": round(jobs[0]["uploaded_bytes"] / 2**20, 2),
            "cold": jobs[0],
            "warm": jobs[1:],
            "wanted": "at most 5 MiB travel",
        },
    )


def submitted(head: Head, store: Path, run: Path) -> dict[str, Any]:
    """Seconds from the start of the command until what its run's event log records."""
    words = ["submit", "--json", "--", "train", "--store", str(store), "--out", str(run), *FLAGS.split()]
    words += ["--tracking-uri", f"sqlite:///{run.parent}/mlflow.db", "--json"]
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": head.token,
        "RAY_API_SERVER_ADDRESS": head.dashboard,
    }
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "ray_app", *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True
    )
    ended, result = time.time(), json.loads(done.stdout)
    first: dict[str, float] = {}
    for line in entries(run):
        if line["kind"] in ("run_started", "workers_started", "step"):
            first.setdefault(line["kind"], round(line["time"] - began, 2))
    return {
        "uploaded_bytes": result["uploaded_bytes"],
        "seconds_to_driver": first["run_started"],
        "seconds_to_worker": first["workers_started"],
        "seconds_to_first_step_done": first["step"],
        "seconds_to_end": round(ended - began, 2),
    }


if __name__ == "__main__":
    require_commit()
    main()

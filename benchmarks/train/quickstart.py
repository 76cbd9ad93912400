"""`ray-app quickstart` in a new folder: its test part's table, which the README shows.

    python -m benchmarks.train.quickstart --folder /tmp/quickstart

Writes benchmarks/results/quickstart.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.provenance import require_commit, save

KEPT = (
    "pairs",
    "cos_sim_mean",
    "cosine_accept_rate",
    "baselines",
    "best_baseline",
    "lift_by_theta",
    "interval95",
    "verdict",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="new folder for the store, the run and the registry"
    )
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True)
    flags = ["--out", str(folder / "runs"), "--tracking-uri", f"sqlite:///{folder}/mlflow.db", "--json"]
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "ray_app", "quickstart", *flags], check=True, stdout=subprocess.PIPE)
    seconds = round(time.monotonic() - began, 1)
    result = json.loads(done.stdout)["evaluate"]
    save("quickstart", {"seconds": seconds, **{key: result[key] for key in KEPT}})


if __name__ == "__main__":
    require_commit()
    main()

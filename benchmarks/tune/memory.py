"""Memory for a sweep's pairs with one and with four trials at a time on this machine.

    python -m benchmarks.tune.memory --store STORE --folder /tmp/tune-memory

Counted is what is resident of Ray's shared memory, each page once however many processes have it (PSS of the mappings
of /dev/shm, summed over the sweep's processes), while trials train; and what one trial's process has for itself
alone. With --lowrank the same of trials of `lowrank`, whose means and bases are shared as well.
Writes benchmarks/results/tune_memory.json.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.provenance import require_commit, save
from benchmarks.train.chaos import title
from ray_app.config.base import SplitConfig
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs

RAY_APP = Path(sys.executable).with_name("ray-app")
FIXED = {"strategy": "bottleneck", "hidden_dim": 8, "num_epochs": 6, "early_stop_patience": 6}
LOWRANK = {"strategy": "lowrank", "rank": 64, "hidden_dim": 64}
"""Other settings of --lowrank."""
LONG = {"num_epochs": 30, "early_stop_patience": 30}
SAMPLE_S = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for the sweeps")
    parser.add_argument("--lowrank", action="store_true", help="measure trials of lowrank, too")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    store = PairStore.open(args.store)
    split = split_pairs(store.index, SplitConfig())
    width = store.feature("event").num_bytes + store.feature("target").num_bytes
    at, kinds = (
        args.folder.resolve(),
        {"full": FIXED} | ({"lowrank": LOWRANK | LONG} if args.lowrank else {}),
    )
    found = {kind: one_and_four(args.store.resolve(), at / kind, fixed) for kind, fixed in kinds.items()}
    save(
        "tune_memory",
        {
            "pairs_bytes": width * (len(split.train) + len(split.val)),
            **found.pop("full"),
            **found,
        },
    )


def one_and_four(store: Path, folder: Path, fixed: dict[str, Any]) -> dict[str, Any]:
    """Sweeps with one and with four trials at a time, and the ratio of what is shared."""
    folder.mkdir()
    found = {str(n): measured(store, folder, n, fixed) for n in (1, 4)}
    ratio = round(found["4"]["shared_bytes"] / found["1"]["shared_bytes"], 4)
    return {"by_trials_at_a_time": found, "ratio": ratio}


def measured(store: Path, folder: Path, concurrent: int, fixed: dict[str, Any]) -> dict[str, Any]:
    """Run a sweep with so many trials at a time and sample its memory once a second."""
    file, out = folder / f"{concurrent}.yaml", folder / f"sweep-{concurrent}"
    sweep = {"base": fixed, "space": {"learning_rate": [1.0e-3, 2.0e-3, 3.0e-3, 4.0e-3]}, "search_alg": "grid"}
    more = {"scheduler": "none", "max_concurrent_trials": concurrent, "cpus_per_worker": 0.5, "max_trials": 4}
    file.write_text(yaml.safe_dump({"store": str(store), "out": str(out)} | sweep | more))
    words = ["tune", str(file), "--no-final", "--yes", "--json", "--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    process = subprocess.Popen([str(RAY_APP), *words], stdout=subprocess.DEVNULL)
    shared, alone, most = [], [], 0
    while process.poll() is None:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        trials = [each for each in tree if "ImplicitFunc" in title(each)]
        training = sum(b'"step"' in path.read_bytes() for path in out.glob("trials/*/events.jsonl"))
        if trials and training >= concurrent:
            most = max(most, len(trials))
            shared.append(sum(shared_bytes(each) for each in tree))
            alone += [uss(each) for each in trials]
        time.sleep(SAMPLE_S)
    assert process.returncode == 0
    assert most == concurrent, f"{most} trials at a time"
    return {
        "processes": most,
        "samples": len(shared),
        "shared_bytes": statistics.median(shared),
        "shared_bytes_most": max(shared),
        "own_bytes_of_a_trial": statistics.median(alone),
    }


def shared_bytes(process: psutil.Process) -> int:
    """PSS of the process's mappings of shared memory."""
    try:
        maps = process.memory_maps(grouped=True)
    except psutil.Error:
        return 0
    return sum(each.pss for each in maps if each.path.startswith("/dev/shm"))


def uss(process: psutil.Process) -> int:
    """Return the bytes that would be free if the process ended."""
    try:
        return process.memory_full_info().uss
    except psutil.Error:
        return 0


if __name__ == "__main__":
    require_commit()
    main()

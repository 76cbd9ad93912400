"""The full reference job on rendered scenes: 5,208 pairs, 150,528 wide, hidden 512, 3 epochs, 80/20.

    python -m benchmarks.train.reference_job --folder /tmp/reference-job

Prepares the store once, then trains and evaluates under the sequence split and under the window split, as
a user would: by `ray-app`, one process a command. Peak memory is sampled from outside, twice a second, over
each command's whole process tree. Writes benchmarks/results/reference_job.json.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.provenance import RESULTS, provenance, require_commit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for the store and the runs")
    parser.add_argument("--num-pairs", type=int, default=5208)
    parser.add_argument("--num-sequences", type=int, default=84)
    parser.add_argument("--num-epochs", type=int, default=3)
    parser.add_argument("--splits", nargs="+", choices=["sequence", "window"], default=["sequence", "window"])
    parser.add_argument("--use-gpu", action="store_true", help="train, evaluate and benchmark there")
    parser.add_argument("--result", type=Path, help="default: results/reference_job.json, …_gpu.json with --use-gpu")
    args = parser.parse_args()
    args.result = args.result or RESULTS / f"reference_job{'_gpu' if args.use_gpu else ''}.json"
    args.folder.mkdir(parents=True, exist_ok=True)
    store = args.folder / "store"
    result: dict[str, Any] = {
        "provenance": provenance(),
        "scenes": "rendered, events simulated",
        "splits": {},
    }

    scenes = ["--num-pairs", args.num_pairs, "--num-sequences", args.num_sequences]
    if not store.exists():  # else it is one of these pairs, prepared before
        result["prepare"] = measured("prepare", "scenes", "--out", store, *scenes)
    save(args.result, result)
    device = ["--use-gpu"] if args.use_gpu else []
    for split in args.splits:
        run, report = args.folder / f"run-{split}", args.folder / f"report-{split}"
        tracking = ["--tracking-uri", f"sqlite:///{args.folder.resolve()}/mlflow.db"]
        common = ["--store", store, "--split", split, *tracking]
        epochs = ["--num-epochs", args.num_epochs, "--early-stop-patience", args.num_epochs]
        result["splits"][split] = {
            "inspect": measured("inspect", store, "--split", split)["result"]["split"],
            "train": measured("train", *common, "--out", run, *epochs, *device),
        }
        save(args.result, result)
        result["splits"][split]["evaluate"] = measured(
            "evaluate", *common, "--checkpoint", run, "--out", report, *device
        )
        save(args.result, result)
    bench = [
        "--store",
        store,
        "--checkpoint",
        args.folder / f"run-{args.splits[0]}",
        "--out",
        args.folder / "benchmark",
        *device,
    ]
    result["benchmark"] = measured("benchmark", *bench)
    save(args.result, result)


def measured(*words: object) -> dict[str, Any]:
    """Run `ray-app WORDS --json`: its result, seconds, and peak resident memory in MiB."""
    command = [sys.executable, "-m", "ray_app", *map(str, words), "--json"]
    print(" ".join(command), file=sys.stderr, flush=True)
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    peaks: dict[str, float] = {}
    watcher = threading.Thread(target=watch, args=(process, peaks), daemon=True)
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with code {process.returncode}")
    seconds = time.monotonic() - started
    return {"seconds": round(seconds, 1), "peak_mib": peaks, "result": json.loads(output)}


def watch(process: subprocess.Popen[bytes], peaks: dict[str, float]) -> None:
    """Keep the largest resident size of a worker, with and without shared memory, and of all together."""
    while process.poll() is None:
        total = 0.0
        for pid in descendants(process.pid):
            rss, shared, name = memory_of(pid)
            total += rss - shared
            kind = "worker" if name.startswith("ray::") else "driver" if pid == process.pid else "other"
            peaks[f"{kind}_rss"] = max(peaks.get(f"{kind}_rss", 0.0), rss)
            peaks[f"{kind}_private"] = max(peaks.get(f"{kind}_private", 0.0), rss - shared)
        peaks["all_private"] = max(peaks.get("all_private", 0.0), total)
        time.sleep(0.5)


def descendants(root: int) -> list[int]:
    """Process ids of the tree below and with `root`."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended meanwhile
            parents.setdefault(int(fields[1]), []).append(int(entry))
    tree, queue = [], [root]
    while queue:
        pid = queue.pop()
        tree.append(pid)
        queue += parents.get(pid, [])
    return tree


def memory_of(pid: int) -> tuple[float, float, str]:
    """(resident MiB, of it shared memory MiB, title) of a process; zeros when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return 0.0, 0.0, ""
    sizes = {
        line.split(":")[0]: line.split()[1]
        for line in status.splitlines()
        if line.startswith("Rss") or line.startswith("VmRSS")
    }
    return int(sizes.get("VmRSS", 0)) / 1024, int(sizes.get("RssShmem", 0)) / 1024, title


def save(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    require_commit()
    main()

"""A store that is larger than any machine's memory, trained on by one worker and by workers that divide the features.

    python -m benchmarks.train.larger_than_memory --folder /tmp/larger

Each machine is a raylet in a memory cgroup (v1, as root) with the same limit, which the kernel enforces by SIGKILL.
The head, with driver and controller, is one more; each other machine has one worker. One worker is tried twice: with
the machine's own memory in Ray's books, and with far more. Counted are the most that a worker had resident, until its
first step and to its end, kills by the kernel, and bytes that Ray spilled to disk, sampled four times a second.
Writes benchmarks/results/larger_than_memory.json.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}

from ray.cluster_utils import Cluster

from benchmarks.provenance import require_commit, save
from ray_app import write_store
from ray_app.config.train import TrainConfig
from ray_app.runs.event_log import entries
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs

WIDTH = 150_528
OBJECT_STORE_BYTES = 200 * 2**20
OTHER_BYTES = 2**30
"""Memory of a machine that its raylet, agents and a worker's libraries take."""
PLENTY_BYTES = 2**40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="new folder; about 3 GB, removed at the end")
    parser.add_argument("--pairs", type=int, default=8_500)
    parser.add_argument("--limit-gib", type=float, default=2.25, help="memory of each machine")
    parser.add_argument("--hidden", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    store, limit = args.folder.resolve() / "store", int(args.limit_gib * 2**30)
    write_pairs(store, args.pairs)
    memory_for_ray = limit - OBJECT_STORE_BYTES - OTHER_BYTES
    cells = {
        "1 worker, refused by the plan": (1, memory_for_ray),
        "1 worker, not refused": (1, PLENTY_BYTES),
        **{f"{workers} workers by features": (workers, memory_for_ray) for workers in args.workers},
    }
    measured = {}
    for number, (name, (workers, memory)) in enumerate(cells.items()):
        measured[name] = train(store, args.folder.resolve() / f"run-{number}", workers, memory, limit, args.hidden)
        print(name, json.dumps(measured[name], indent=1), file=sys.stderr)
    opened = PairStore.open(store)
    split = split_pairs(opened.index, TrainConfig(store=store, out=args.folder).split_config)
    result = {
        "settings": vars(args) | {"folder": str(args.folder)},
        "pairs_gib": round(args.pairs * 2 * WIDTH / 2**30, 2),
        "held_pairs_gib": round((len(split.train) + len(split.val)) * 2 * WIDTH / 2**30, 2),
        "files_gib": round(sum(record.bytes for record in opened.files) / 2**30, 2),
        "machine_gib": args.limit_gib,
        "object_store_gib": round(OBJECT_STORE_BYTES / 2**30, 2),
        "runs": measured,
    }
    shutil.rmtree(args.folder)
    save("larger_than_memory", result)


def write_pairs(store: Path, pairs: int) -> None:
    """Write pairs of a few random images, each with its number in its first bytes."""
    drawn = np.random.default_rng(0).integers(1, 256, (2, 64, WIDTH), np.uint8)

    def rows() -> Iterator[dict[str, Any]]:
        for n in range(pairs):
            event, target = drawn[:, n % 64].copy()
            event[:8] = np.frombuffer(n.to_bytes(8, "little"), np.uint8)
            yield {"event": event, "target": target, "sequence": f"drive {n // 100}"}

    write_store(store, rows())


def train(store: Path, run: Path, workers: int, memory: int, limit: int, hidden: int) -> dict[str, Any]:
    """Train one epoch on machines of this size, as a user would."""
    groups = [Group(f"ray-app-{os.getpid()}-{n}", limit) for n in range(workers + 1)]
    node = {"object_store_memory": OBJECT_STORE_BYTES, "memory": memory}
    cluster = None
    try:
        with groups[0].joined():
            cluster = Cluster(
                initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **node}
            )
        for group in groups[1:]:
            with group.joined():
                cluster.add_node(num_cpus=1, **node)
        words = f"train --store {store} --out {run} --address {cluster.address} --strategy lightweight"
        words += f" --hidden-dim {hidden} --batch-size 32 --num-epochs 1 --num-workers {workers} --cpus-per-worker 1"
        words += f" --max-failures 0 --tracking-uri sqlite:///{run.parent}/mlflow.db"
        words += " --parallelism feature" if workers > 1 else ""
        began = time.monotonic()
        with groups[0].joined(), run.with_suffix(".log").open("w") as log:
            command = [sys.executable, "-m", "ray_app", *words.split()]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        peaks = watch(process, groups, run, Path(cluster.head_node._session_dir))
        lines = [line for line in run.with_suffix(".log").read_text().splitlines() if line.strip()]
        return {
            "exit_code": process.returncode,
            "last_words": lines[-1][:600] if process.returncode else "",
            "seconds": round(time.monotonic() - began, 1),
            "steps": steps(run),
            **peaks,
            "kills_by_the_kernel": sum(group.kills() for group in groups),
        }
    finally:
        if cluster:
            cluster.shutdown()
        for group in groups:
            group.remove()


class Group:
    """A memory cgroup below this process's own."""

    def __init__(self, name: str, limit: int) -> None:
        (line,) = [line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line]
        self.own = Path("/sys/fs/cgroup/memory") / line.split(":", 2)[2].lstrip("/")
        self.folder = self.own / name
        self.folder.mkdir()
        (self.folder / "memory.limit_in_bytes").write_text(str(limit))

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Be in the group, so that processes started here are."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (self.own / "cgroup.procs").write_text(str(os.getpid()))

    def pids(self) -> list[int]:
        """Processes in the group."""
        return [int(pid) for pid in (self.folder / "cgroup.procs").read_text().split()]

    def kills(self) -> int:
        """Processes that the kernel has killed for memory."""
        found = re.search(r"^oom_kill (\d+)", (self.folder / "memory.oom_control").read_text(), re.MULTILINE)
        assert found
        return int(found[1])

    def remove(self) -> None:
        """End what is left in it, and delete it."""
        until = time.monotonic() + 30
        while pids := self.pids():
            for pid in pids if time.monotonic() > until - 20 else ():
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)
            time.sleep(0.2)
        self.folder.rmdir()


def watch(process: "subprocess.Popen[bytes]", groups: list["Group"], run: Path, session: Path) -> dict[str, float]:
    """Sample until a process ends: the most that a worker, and the driver, had resident, and the bytes spilled."""
    worker = loading = driver = spilled = 0
    while process.poll() is None:
        for pid in (pid for group in groups for pid in group.pids()):
            with suppress(psutil.Error, OSError):
                if pid == process.pid:
                    driver = max(driver, most_resident(pid))
                elif "RayTrainWorker" in " ".join(psutil.Process(pid).cmdline()):
                    worker = max(worker, most_resident(pid))
        loading = loading if steps(run) else worker
        with suppress(OSError):
            files = list(session.glob("ray_spilled_objects_*/*"))
            spilled = max(spilled, sum(path.stat().st_size for path in files))
        time.sleep(0.25)
    return {
        "worker_gib": round(worker / 2**30, 2),
        "worker_gib_until_first_step": round(loading / 2**30, 2),
        "driver_gib": round(driver / 2**30, 2),
        "spilled_gib": round(spilled / 2**30, 2),
    }


def steps(run: Path) -> int:
    """Steps that a run has logged."""
    return sum(line["kind"] == "step" for line in entries(run)) if (run / "events.jsonl").exists() else 0


def most_resident(pid: int) -> int:
    """Most that a process has had resident, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return 1024 * int(found[1]) if found else 0


if __name__ == "__main__":
    require_commit()
    main()

"""Endpoint under faults: overload, new and bad champions, killed replicas, a long run.

    python -m benchmarks.serve.chaos overload
    python -m benchmarks.serve.chaos overload --precision fp32
    python -m benchmarks.serve.chaos champions
    python -m benchmarks.serve.chaos kills
    python -m benchmarks.serve.chaos soak

`overload`: capacity in a closed loop, then four times that rate in an open loop; without retries. In fp32 a forward
pass takes so long that four times the rate is one that this machine's callers can ask at. `champions`: 20
good and 5 bad versions become champion in a real registry while callers ask without pause. `kills`: SIGKILL to one of
two replicas, ten times, while threads ask through `ray_app.client`. `soak`: a steady low rate, memory and file
descriptors every half minute. Traffic comes from this machine and shares its cores. Writes
benchmarks/results/serve_PART.json.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from mlflow import MlflowClient

from benchmarks.provenance import require_commit, save
from benchmarks.serve.process import checkpoint_of, endpoint, scraped, tree
from benchmarks.serve.traffic import Request, Traffic, closed_loop, infer_request, open_loop, quantiles_ms
from ray_app.client import AlignmentClient
from ray_app.errors import RayAppError
from ray_app.store.atomic import sha256_bytes, verify_folder

WIDTH, HIDDEN = 4096, 512
ROUTE = "/v2/models/{model}/infer"
MODEL = "alignment-adapter"
GOOD, BAD, KILLS = 20, 5, 10


def pixels(pairs: int, width: int = WIDTH) -> np.ndarray:
    """Seeded, (pairs, width)."""
    return np.random.default_rng(0).integers(1, 256, (pairs, width), dtype=np.uint8)


def overload(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    width = args.width or 150_528
    checkpoint = checkpoint_of(folder / "checkpoint", width, HIDDEN)
    with endpoint(checkpoint, "--precision", args.precision) as (base, _):
        request = infer_request(base, pixels(1, width), ("aligned",))
        closed_loop(request, 8, 3.0)
        full = closed_loop(request, 48, args.seconds, warm_s=2.0)
        capacity = len(full.ok_s) / full.seconds
        before = counted(base)
        flood = open_loop(request, 4 * capacity, args.seconds, most=1000)
        server = counted(base) - before
        after = closed_loop(request, 4, 5.0)
    accepted, at_capacity = quantiles_ms(flood.ok_s), quantiles_ms(full.ok_s)
    return {
        "width": width,
        "precision": args.precision,
        "capacity_requests_per_s": round(capacity, 1),
        "asked_per_s": round(sum(flood.codes.values()) / flood.seconds, 1),
        "at_capacity_48_callers": full.summary(),
        "at_4_times_capacity": flood.summary(),
        "refused": quantiles_ms(flood.refused_s),
        "accepted_p99_over_capacity_p99": ratio(accepted["p99_ms"], at_capacity["p99_ms"]),
        "callers_counted": {str(code): n for code, n in sorted(flood.codes.items())},
        "server_counted": dict(sorted(server.items())),
        "counts_are_equal": {str(code): n for code, n in flood.codes.items()} == dict(server),
        "afterwards_4_callers": after.summary(),
        "wanted": "accepted p99 at most 3.5 times that at capacity, the rest 429, counts equal",
    }


def counted(base: str) -> Counter[str]:
    """Answers to inferences by code, as the server counts them."""
    return Counter(
        {code: int(scraped(base, "align_requests_total", route=ROUTE, code=code)) for code in ("200", "429")}
    )


def ratio(a: float | None, b: float | None) -> float | None:
    return round(a / b, 3) if a and b else None


def champions(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    client = MlflowClient(uri := f"sqlite:///{folder}/mlflow.db")
    experiment = client.create_experiment("alignment", (folder / "artifacts").as_uri())
    client.create_registered_model(MODEL)
    register(client, experiment, checkpoint_of(folder / "0", WIDTH, HIDDEN))
    order = ["good"] * GOOD + ["bad"] * BAD
    np.random.default_rng(0).shuffle(order)
    reloads: list[dict[str, Any]] = []
    with endpoint(f"models:/{MODEL}@champion", "--tracking-uri", uri, "--reload-interval-s", "3600") as (base, _):
        request = infer_request(base, pixels(1), ("aligned",))
        alone = closed_loop(request, 8, 10.0)
        with under_load(request, 8) as traffic:
            for number, kind in enumerate(order, start=1):
                checkpoint = checkpoint_of(folder / str(number), WIDTH, HIDDEN, seed=number)
                if kind == "bad":
                    SPOILS[sum(one["kind"] == "bad" for one in reloads) % len(SPOILS)](checkpoint)
                version = register(client, experiment, checkpoint)
                reloads.append({"kind": kind, "version": version, **reload(base)})
                print(reloads[-1], file=sys.stderr, flush=True)
                time.sleep(args.pause)
        with urllib.request.urlopen(f"{base}/v1/model", timeout=30) as reply:
            refused = json.load(reply)["refused"]
    right = [one["action"] == ("swapped" if one["kind"] == "good" else "refused") for one in reloads]
    return {
        "width": WIDTH,
        "good": GOOD,
        "bad": BAD,
        "taken_or_refused_rightly": sum(right),
        "reloads": reloads,
        "last_refusal": refused,
        "without_reloads_8_callers": alone.summary(),
        "under_reloads_8_callers": traffic.summary(),
        "p99_over_idle_p99": ratio(traffic.summary()["p99_ms"], alone.summary()["p99_ms"]),
        "answers_other_than_200": sum(n for code, n in traffic.codes.items() if code != 200),
        "wanted": "0 answers other than 200",
    }


def register(client: MlflowClient, experiment: str, checkpoint: Path) -> str:
    """Register a version with these files, tagged as `promote` does it, and make it champion."""
    run = client.create_run(experiment).info.run_id
    client.log_artifacts(run, str(checkpoint), "checkpoint")
    tags = {"checkpoint_sha256": sha256_bytes((checkpoint / "MANIFEST.sha256").read_bytes())}
    version = str(client.create_model_version(MODEL, f"runs:/{run}/checkpoint", run, tags=tags).version)
    client.set_registered_model_alias(MODEL, "champion", version)
    return version


def reload(base: str) -> dict[str, Any]:
    """POST /v1/reload: what came of it, and how long it took."""
    began = time.perf_counter()
    asked = urllib.request.Request(f"{base}/v1/reload", method="POST", data=b"")
    try:
        with urllib.request.urlopen(asked, timeout=60) as reply:
            action, reason = json.load(reply)["action"], None
    except urllib.error.HTTPError as error:
        document = json.load(error)
        action, reason = document["code"], document["error"]
    return {"action": action, "reason": reason, "seconds": round(time.perf_counter() - began, 2)}


def flip_bit(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-3] ^= 4
    (folder / "model.safetensors").write_bytes(bytes(data))


def forge(folder: Path) -> None:
    """One output weight, and sums that hold: only the golden answers can tell."""
    old = sha256_bytes((folder / "model.safetensors").read_bytes())
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-HIDDEN * 4 :] = np.ones(HIDDEN, "<f4").tobytes()
    (folder / "model.safetensors").write_bytes(bytes(data))
    sums = (folder / "MANIFEST.sha256").read_text()
    (folder / "MANIFEST.sha256").write_text(sums.replace(old, sha256_bytes(bytes(data))))
    verify_folder(folder)


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def lose(folder: Path) -> None:
    (folder / "config.json").unlink()


def narrow(folder: Path) -> None:
    """Write a sound checkpoint of other features."""
    other = checkpoint_of(folder.with_name(f"{folder.name}-narrow"), WIDTH // 2, HIDDEN)
    for file in other.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


SPOILS: tuple[Callable[[Path], None], ...] = (flip_bit, forge, cut, lose, narrow)


@contextlib.contextmanager
def under_load(request: Request, callers: int):  # type: ignore[no-untyped-def]
    """Traffic until the block ends; its numbers are whole after it."""
    total = Traffic(request.pairs)
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            part = closed_loop(request, callers, 2.0, warm_s=0.0)
            total.ok_s += part.ok_s
            total.codes += part.codes
            total.seconds += part.seconds

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield total
    finally:
        stop.set()
        thread.join()


def kills(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    failures: list[str] = []
    took: list[float] = []
    back: list[float] = []
    stop = threading.Event()
    event = pixels(1)

    def ask(client: AlignmentClient) -> None:
        while not stop.is_set():
            began = time.perf_counter()
            try:
                client.align(event)
            except RayAppError as error:
                failures.append(str(error))
            took.append(time.perf_counter() - began)

    with endpoint(checkpoint_of(folder / "checkpoint", WIDTH, HIDDEN), "--num-replicas", "2") as (base, process):
        clients = [AlignmentClient(base, timeout_s=30.0) for _ in range(4)]
        threads = [threading.Thread(target=ask, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for number in range(KILLS):
            time.sleep(args.pause)
            victim = replicas(process)[number % 2]
            began = time.monotonic()
            victim.kill()
            while len(replicas(process)) < 2 or victim.pid in {one.pid for one in replicas(process)}:
                time.sleep(0.1)
            while not answering(base, 2):
                time.sleep(0.1)
            back.append(round(time.monotonic() - began, 2))
            print(number, back[-1], len(took), len(failures), file=sys.stderr, flush=True)
        time.sleep(2.0)
        stop.set()
        for thread in threads:
            thread.join()
    return {
        "width": WIDTH,
        "replicas": 2,
        "kills": KILLS,
        "requests": len(took),
        "failures": len(failures),
        "what_failed": failures[:5],
        "sent_again": sum(client.retries for client in clients),
        "latency": quantiles_ms(took),
        "seconds_until_two_answer_again": back,
        "wanted": "0 failures through the client",
    }


def replicas(process: psutil.Process) -> list[psutil.Process]:
    """Return the replicas' processes, oldest first."""
    found = []
    for one in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("ServeReplica" in word for word in one.cmdline()) and one.status() != psutil.STATUS_ZOMBIE:
                found.append((one.create_time(), one))
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def answering(base: str, count: int) -> bool:
    """Whether so many replicas answer: metrics are asked of each."""
    try:
        with urllib.request.urlopen(f"{base}/metrics", timeout=5) as reply:
            lines = [line for line in reply.read().decode().splitlines() if line.startswith("align_in_flight{")]
    except OSError:
        return False
    return len(lines) >= count


def soak(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    samples: list[dict[str, float]] = []
    with endpoint(checkpoint_of(folder / "checkpoint", WIDTH, HIDDEN)) as (base, process):
        request = infer_request(base, pixels(4), ("aligned",))
        total, began = Traffic(4), time.monotonic()
        while (minute := (time.monotonic() - began) / 60) < args.minutes:
            part = open_loop(request, args.rate, 30.0)
            total.ok_s += part.ok_s
            total.codes += part.codes
            total.seconds += part.seconds
            scraped(base, "align_in_flight")
            samples.append({"minute": round(minute, 2), **usage(process)})
            print(samples[-1], file=sys.stderr, flush=True)
    settled = [one for one in samples if one["minute"] >= min(3.0, args.minutes / 4)]
    return {
        "width": WIDTH,
        "minutes": args.minutes,
        "requests_asked_per_s": args.rate,
        "traffic": total.summary(),
        "replica_mib_per_hour": slope(settled, "replica_mib"),
        "all_mib_per_hour": slope(settled, "all_mib"),
        "replica_fds": [settled[0]["replica_fds"], settled[-1]["replica_fds"]],
        "all_fds": [settled[0]["all_fds"], settled[-1]["all_fds"]],
        "samples": samples,
        "wanted": "memory and file descriptors flat",
    }


def usage(process: psutil.Process) -> dict[str, float]:
    """Memory that is the processes' own (USS), and file descriptors: of the replica, and of all."""
    found = {"replica_mib": 0.0, "replica_fds": 0, "all_mib": 0.0, "all_fds": 0}
    own = {one.pid for one in replicas(process)}
    for one in tree(process):
        with contextlib.suppress(psutil.Error):
            mib, fds = one.memory_full_info().uss / 2**20, one.num_fds()
            found["all_mib"] += mib
            found["all_fds"] += fds
            if one.pid in own:
                found["replica_mib"] += mib
                found["replica_fds"] += fds
    return {name: round(value, 1) for name, value in found.items()}


def slope(samples: list[dict[str, float]], name: str) -> float:
    """Per hour, by least squares."""
    minutes = np.array([one["minute"] for one in samples])
    return round(float(np.polyfit(minutes / 60, [one[name] for one in samples], 1)[0]), 2)


PARTS = {"overload": overload, "champions": champions, "kills": kills, "soak": soak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--width", type=int, help="of features, for overload; default 150528")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="of overload's model")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement of overload")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between two champions, or two kills")
    parser.add_argument("--minutes", type=float, default=20.0, help="of the soak")
    parser.add_argument("--rate", type=float, default=10.0, help="requests a second in the soak")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = PARTS[args.part](Path(folder), args)
    name = args.part if args.precision == "auto" else f"{args.part}_{args.precision}"
    save(f"serve_{name}", {"hidden_dim": HIDDEN, **result})


if __name__ == "__main__":
    require_commit()
    main()

"""Speed of the endpoint, alone and against other servers of the same adapter.

    python -m benchmarks.serve.load matrix --width 150528
    python -m benchmarks.serve.load matrix --width 4096
    python -m benchmarks.serve.load matrix --width 150528 --use-gpu
    python -m benchmarks.serve.load rivals --width 150528
    python -m benchmarks.serve.load rivals --width 4096

Pixels (uint8) go in, aligned features (float32) come out, in binary form; `mlflow models serve` speaks JSON alone.
`matrix`: 1, 4, 16, 64 callers in a closed loop, each with 1, 8, 32 pairs a request; the queue holds all of them.
`rivals`: the same load in turn on this endpoint, a bare uvicorn app, LitServe and `mlflow models serve`, then ours
and the bare app at equal rates in an open loop, and at those rates the endpoint's own app without Ray and HAProxy.
Traffic comes from this machine and shares its cores. Writes benchmarks/results/serve_load_PART_WIDTH.json.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.provenance import require_commit, save
from benchmarks.serve.process import BIN, checkpoint_of, endpoint, free_port, process, scraped
from benchmarks.serve.traffic import Request, closed_loop, infer_request, json_body, open_loop

CALLERS = (1, 4, 16, 64)
PAIRS = (1, 8, 32)
COMPARED = ((1, 1), (4, 1), (16, 1), (64, 1), (4, 8), (16, 8))
"""(callers, pairs) on every server."""
RATES = (0.5, 0.8)
"""Of the bare app's throughput at 16 callers with one pair, for the comparison at equal load."""
ROOMY = ("--max-queue", "2048", "--timeout-s", "120")
HIDDEN = 512
RIVALS, LITSERVE = "benchmarks.serve.rivals", "benchmarks.serve.rival_litserve"


def pixels(pairs: int, width: int) -> np.ndarray:
    """Seeded, (pairs, width)."""
    return np.random.default_rng(0).integers(1, 256, (pairs, width), dtype=np.uint8)


def matrix(checkpoint: Path, width: int, seconds: float, flags: tuple[str, ...]) -> dict[str, Any]:
    cells = []
    with endpoint(checkpoint, *flags) as (base, _):
        for pairs in PAIRS:
            for callers in CALLERS:
                request = infer_request(base, pixels(pairs, width), ("aligned",))
                before = computing_s(base)
                found = closed_loop(request, callers, seconds, warm_s=0.0)
                busy = (computing_s(base) - before) / found.seconds
                cells.append(
                    {
                        "callers": callers,
                        "pairs_a_request": pairs,
                        **found.summary(),
                        "share_outside_forward": round(1 - busy, 3),
                    }
                )
                print(cells[-1], file=sys.stderr, flush=True)
        verdicts = infer_request(base, pixels(1, width), ("cos_sim", "accepted"), pixels(1, width))
        alone = closed_loop(verdicts, 1, seconds).summary()
    return {"flags": flags, "seconds_a_cell": seconds, "cells": cells, "only_cos_sim_1_caller": alone}


def computing_s(base: str) -> float:
    """Seconds of forward passes so far."""
    return scraped(base, "align_compute_seconds_sum")


def rivals(checkpoint: Path, width: int, seconds: float, folder: Path) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ("ours", "bare", "litserve", "mlflow"):
        with server(name, checkpoint, folder) as base:
            for callers, pairs in COMPARED:
                traffic = closed_loop(request_to(name, base, pixels(pairs, width)), callers, seconds, warm_s=2.0)
                cell = {"callers": callers, "pairs_a_request": pairs, **traffic.summary()}
                found.setdefault(name, []).append(cell)
                print(name, cell, file=sys.stderr, flush=True)
    capacity = next(c["requests_per_s"] for c in found["bare"] if (c["callers"], c["pairs_a_request"]) == (16, 1))
    equal: list[dict[str, Any]] = []
    for name in ("ours", "bare", "app"):
        with server(name, checkpoint, folder) as base:
            request = request_to(name, base, pixels(1, width))
            closed_loop(request, 4, 1.0)
            for share in RATES:
                traffic = open_loop(request, share * capacity, max(seconds, 200 / capacity))
                equal.append({"server": name, "share_of_capacity": share, **traffic.summary()})
    return {
        "seconds_a_cell": seconds,
        "servers": found,
        "ours_over_mlflow_pairs_per_s": ratios(found["ours"], found["mlflow"], "pairs_per_s"),
        "ours_over_bare_p99": ratios(found["ours"], found["bare"], "p99_ms"),
        "equal_rate": equal,
        "ours_over_bare_p99_at_equal_rate": [
            round(a["p99_ms"] / b["p99_ms"], 3)
            for a, b in zip(of_server(equal, "ours"), of_server(equal, "bare"), strict=True)
        ],
        "app_without_ray_over_bare_p99_at_equal_rate": [
            round(a["p99_ms"] / b["p99_ms"], 3)
            for a, b in zip(of_server(equal, "app"), of_server(equal, "bare"), strict=True)
        ],
        "wanted": "3 times the throughput of mlflow; p99 at most 1.3 times that of the bare app at equal load",
    }


def of_server(cells: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return the cells of one server."""
    return [cell for cell in cells if cell["server"] == name]


def ratios(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> list[float | None]:
    """Cell by cell; None where they did not answer."""
    return [round(a[key] / b[key], 3) if a[key] and b[key] else None for a, b in zip(ours, theirs, strict=True)]


@contextlib.contextmanager
def server(name: str, checkpoint: Path, folder: Path) -> Iterator[str]:
    """Yield the address of one of them."""
    if name == "ours":
        with endpoint(checkpoint, *ROOMY) as (base, _):
            yield base
        return
    base = f"http://127.0.0.1:{(port := free_port())}"
    if name == "mlflow":
        model = folder / "mlflow-model"
        if not model.exists():
            subprocess.run([sys.executable, "-m", RIVALS, "mlflow", str(checkpoint), str(model)], check=True)
        command = [
            str(BIN / "mlflow"),
            "models",
            "serve",
            "-m",
            str(model),
            "-p",
            str(port),
            "--env-manager",
            "local",
        ]
        ready = f"{base}/ping"
    else:
        script = [LITSERVE] if name == "litserve" else [RIVALS, name]
        command = [sys.executable, "-m", *script, str(checkpoint), str(port)]
        ready = f"{base}/v2/health/ready" if name == "app" else f"{base}/health"
    with process(command, ready):
        yield base


def request_to(name: str, base: str, event: np.ndarray) -> Request:
    """Return the same pairs in the form that a server takes."""
    if name in ("ours", "app"):
        return infer_request(base, event, ("aligned",))
    if name == "mlflow":
        return Request(f"{base}/invocations", json_body(event), (("Content-Type", "application/json"),), len(event))
    kind = (("Content-Type", "application/octet-stream"),)
    return Request(f"{base}/predict", event.tobytes(), kind, len(event))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("matrix", "rivals"))
    parser.add_argument("--width", type=int, default=150_528)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--use-gpu", action="store_true", help="of matrix")
    args = parser.parse_args()
    if args.use_gpu and args.part != "matrix":
        parser.error("--use-gpu is of matrix")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint_of(Path(folder) / "checkpoint", args.width, HIDDEN)
        if args.part == "matrix":
            flags = (*ROOMY, "--use-gpu") if args.use_gpu else ROOMY
            result = matrix(checkpoint, args.width, args.seconds, flags)
        else:
            result = rivals(checkpoint, args.width, args.seconds, Path(folder))
    device = "_gpu" if args.use_gpu else ""
    save(f"serve_load_{args.part}_{args.width}{device}", {"width": args.width, "hidden_dim": HIDDEN, **result})


if __name__ == "__main__":
    require_commit()
    main()

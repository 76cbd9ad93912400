"""A link between head and worker that is cut: what goes on, what is started again, and that nothing is lost.

Run by `make test-net`, as root; writes what it saw to benchmarks/results/link_cuts.json.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from namespaces import Network, available, network

from ray_app.jobs.journal import entries
from ray_app.store.durable import sha256_file
from ray_app.store.pair_store import PairStore

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from numpy_source import NumpySource, build_store
from provenance import save

CUTS_S = [float(seconds) for seconds in os.environ.get("CUTS_S", "5 30 120").split()]
SCENES = "--num-pairs 64 --num-sequences 16 --width 160 --height 120"
TRAIN = "--hidden-dim 16 --batch-size 8 --num-epochs 60 --early-stop-patience 60 --num-workers 2 --cpus-per-worker 1"
LONGEST_S = 400.0
seen: dict[str, list[dict[str, Any]]] = {"prepare": [], "train": []}


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    if reason := available():
        pytest.skip(reason)
    with network() as made:
        yield made
    save("link_cuts", {"nodes": "a head and two workers of one CPU, an address each", "cuts": seen})


def command(net: Network, words: str) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "RAY_ADDRESS": net.address}
    return subprocess.Popen([sys.executable, "-m", "ray_app", *words.split()], env=environment)


def cut(net: Network, process: "subprocess.Popen[bytes]", seconds: float, sign: Any) -> dict[str, Any]:
    """Cuts the first worker's link, mends it, starts its raylet again if it has ended, and waits for the command."""
    node = net.nodes[0]
    node.cut()
    began, before = time.monotonic(), sign()
    time.sleep(seconds)
    meanwhile = sign() - before
    dead = node.address not in net.alive()
    node.mend(net.bridge)
    time.sleep(2.0)
    ended = node.process is not None and node.process.poll() is not None
    if dead and not ended and node.process:  # it hears of it by its next message
        ended = True
        node.process.wait(60)
    if ended:
        net.start(node)
    at = sign()
    while process.poll() is None and sign() <= at:
        assert time.monotonic() - began < LONGEST_S, "nothing moves any more"
        time.sleep(0.1)
    moved = time.monotonic() - began
    assert process.wait(LONGEST_S) == 0
    return {
        "cut_s": seconds,
        "went_on_meanwhile": meanwhile,
        "node_counted_as_dead": dead,
        "raylet_started_again": ended,
        "seconds_from_cut_to_progress_after_it": round(moved, 1),
    }


def until(process: "subprocess.Popen[bytes]", sign: Any, count: int) -> None:
    began = time.monotonic()
    while sign() < count:
        assert process.poll() is None
        assert time.monotonic() - began < LONGEST_S
        time.sleep(0.05)


@pytest.mark.parametrize("seconds", CUTS_S)
def test_prepare_loses_and_doubles_nothing(net: Network, tmp_path: Path, seconds: float) -> None:
    net.wait()
    clean = command(net, f"prepare scenes --out {tmp_path / 'clean'} {SCENES}")
    assert clean.wait(LONGEST_S) == 0
    out = tmp_path / "store"
    process = command(net, f"prepare scenes --out {out} {SCENES}")
    sign = lambda: len(list(out.glob("*.parquet")))  # noqa: E731
    until(process, sign, 2)
    told = cut(net, process, seconds, sign)
    wanted, found = PairStore.open(tmp_path / "clean"), PairStore.open(out)
    seen["prepare"].append({**told, "files_equal": wanted.manifest.files == found.manifest.files})
    assert wanted.manifest.files == found.manifest.files
    assert wanted.index.sample_id.tolist() == found.index.sample_id.tolist()


@pytest.mark.parametrize("seconds", CUTS_S)
def test_training_ends_with_the_same_bytes(net: Network, tmp_path: Path, seconds: float) -> None:
    net.wait()
    store = build_store(NumpySource(), tmp_path / "store")
    words = f"train --store {store} {TRAIN} --tracking-uri sqlite:///{tmp_path}/mlflow.db --out"
    clean, run = tmp_path / "clean", tmp_path / "run"
    assert command(net, f"{words} {clean}").wait(LONGEST_S) == 0
    process = command(net, f"{words} {run}")
    sign = lambda: sum(line["kind"] == "epoch" for line in told(run))  # noqa: E731
    until(process, sign, 2)
    found = cut(net, process, seconds, sign)
    equal = sha256_file(newest(clean)) == sha256_file(newest(run))
    attempts = sum(line["kind"] == "attempt" for line in told(run))
    seen["train"].append({**found, "restarts": attempts - 1, "weights_equal": equal})
    assert equal


def told(run: Path) -> list[dict[str, Any]]:
    return list(entries(run)) if (run / "journal.jsonl").is_file() else []


def newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir()) / "model.safetensors"

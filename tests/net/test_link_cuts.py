"""Links between head and workers that are cut or slow: what continues, what starts again, and that nothing is lost.

Run by `make test-net`, as root; writes what it saw to benchmarks/results/link_cuts.json and slow_links.json.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from namespaces import Network, available, network, no_discipline
from numpy_source import NumpySource, build_store

from benchmarks.provenance import save
from ray_app.runs.event_log import entries
from ray_app.store.atomic import sha256_file
from ray_app.store.pair_store import PairStore

CUTS_S = [float(seconds) for seconds in os.environ.get("CUTS_S", "5 30 120").split()]
DISCIPLINES = ["netem delay 20ms", "tbf rate 20mbit burst 64kb latency 2s"]
SCENES = "--num-pairs 64 --num-sequences 16 --width 160 --height 120"
TRAIN = "--strategy lightweight --hidden-dim 16 --batch-size 8 --num-epochs 60 --early-stop-patience 60"
TRAIN += " --num-workers 2 --cpus-per-worker 1"
LONGEST_S = 400.0
NODES = "a head and two workers of one CPU, an address each"
seen: dict[str, list[dict[str, Any]]] = {"prepare": [], "train": []}
slow: list[dict[str, Any]] = []


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    if reason := available():
        pytest.skip(reason)
    with network() as made:
        yield made
    if any(seen.values()):
        save("link_cuts", {"nodes": NODES, "cuts": seen})
    if slow:
        save("slow_links", {"nodes": NODES, "slow": slow})


def command(net: Network, words: str) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "RAY_ADDRESS": net.address}
    return subprocess.Popen([sys.executable, "-m", "ray_app", *words.split()], env=environment)


def cut(net: Network, process: "subprocess.Popen[bytes]", seconds: float, sign: Any) -> dict[str, Any]:
    """Cuts the first worker's link, repairs it, starts its raylet again if it ends, and waits for the command.

    A raylet ends when it hears that the head has counted it as dead.
    """
    node, before = net.nodes[0], sign()
    assert node.process
    cut_at = time.monotonic()
    node.cut()
    time.sleep(seconds)
    node.repair(net.bridge)
    repaired_at, at, over = time.monotonic(), sign(), process.poll() is not None
    started = False
    while process.poll() is None and sign() <= at:
        assert time.monotonic() - repaired_at < LONGEST_S, "nothing moves any more"
        if not started and node.process.poll() is not None:
            net.start(node)
            started = True
        time.sleep(0.1)
    moved = time.monotonic() - repaired_at
    code = process.wait(LONGEST_S)
    if not started and node.address not in net.alive():
        node.process.wait(60)
        net.start(node)
        started = True
    assert code == 0
    return {
        "cut_s": round(repaired_at - cut_at, 1),
        "progress_meanwhile": at - before,
        "counted_as_dead_and_started_again": started,
        "seconds_from_repair_to_progress": None if over else round(moved, 1),
    }


def until(process: "subprocess.Popen[bytes]", sign: Any, count: int) -> None:
    began = time.monotonic()
    while sign() < count:
        assert process.poll() is None
        assert time.monotonic() - began < LONGEST_S
        time.sleep(0.05)


@pytest.fixture(scope="module")
def prepared(net: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare` makes where no link is cut."""
    out = tmp_path_factory.mktemp("prepared") / "clean"
    assert command(net, f"prepare scenes --out {out} {SCENES}").wait(LONGEST_S) == 0
    return out


@pytest.fixture(scope="module")
def trained(net: Network, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """`train …` without its --out, and what it makes where no link is cut."""
    folder = tmp_path_factory.mktemp("trained")
    store = build_store(NumpySource(), folder / "store")
    words = f"train --store {store} {TRAIN} --tracking-uri sqlite:///{folder}/mlflow.db"
    assert command(net, f"{words} --out {folder / 'clean'}").wait(LONGEST_S) == 0
    return words, folder / "clean"


@pytest.mark.parametrize("seconds", CUTS_S)
def test_training_ends_with_the_same_bytes(
    net: Network, trained: tuple[str, Path], tmp_path: Path, seconds: float
) -> None:
    net.wait()
    words, clean = trained
    run = tmp_path / "run"
    process = command(net, f"{words} --out {run}")
    sign = lambda: sum(line["kind"] == "epoch" for line in logged(run))  # noqa: E731
    until(process, sign, 2)
    found = cut(net, process, seconds, sign)
    equal = sha256_file(newest(clean)) == sha256_file(newest(run))
    attempts = sum(line["kind"] == "workers_started" for line in logged(run))
    seen["train"].append({**found, "restarts": attempts - 1, "weights_equal": equal})
    assert equal


@pytest.mark.parametrize("how", DISCIPLINES)
def test_training_over_slow_links_ends_with_the_same_bytes(
    net: Network, trained: tuple[str, Path], tmp_path: Path, how: str
) -> None:
    if reason := no_discipline(how):
        pytest.skip(reason)
    net.wait()
    words, clean = trained
    run = tmp_path / "run"
    for node in net.nodes:
        node.send_by(how)
    try:
        assert command(net, f"{words} --out {run}").wait(LONGEST_S) == 0
    finally:
        for node in net.nodes:
            node.send_freely()
    equal = sha256_file(newest(clean)) == sha256_file(newest(run))
    attempts = sum(line["kind"] == "workers_started" for line in logged(run))
    times = {"step_s": step_seconds(run), "step_s_of_a_free_link": step_seconds(clean)}
    slow.append({"tc_at_both_ends": how, **times, "restarts": attempts - 1, "weights_equal": equal})
    assert equal


@pytest.mark.parametrize("seconds", CUTS_S)
def test_prepare_loses_and_doubles_nothing(net: Network, prepared: Path, tmp_path: Path, seconds: float) -> None:
    net.wait()
    out = tmp_path / "store"
    process = command(net, f"prepare scenes --out {out} {SCENES}")
    sign = lambda: len(list(out.glob("*.parquet")))  # noqa: E731
    until(process, sign, 2)
    output = cut(net, process, seconds, sign)
    wanted, found = PairStore.open(prepared), PairStore.open(out)
    seen["prepare"].append({**output, "files_equal": wanted.manifest.files == found.manifest.files})
    assert wanted.manifest.files == found.manifest.files
    assert wanted.index.sample_id.tolist() == found.index.sample_id.tolist()


def logged(run: Path) -> list[dict[str, Any]]:
    return list(entries(run)) if (run / "events.jsonl").is_file() else []


def step_seconds(run: Path) -> float:
    """Of a step, on average over the run."""
    epochs = [line for line in logged(run) if line["kind"] == "epoch"]
    return round(sum(line["train"]["seconds"] for line in epochs) / epochs[-1]["global_step"], 4)


def newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir()) / "model.safetensors"

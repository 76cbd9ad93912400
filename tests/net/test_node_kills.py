"""A node that dies is a delay: a job and an endpoint on three raylets of this machine."""

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from cluster_endpoint import behind_haproxy, cluster_endpoint, replicas
from endpoints import WIDTH, make_checkpoint
from three_nodes import Nodes, three_nodes

from ray_app.client import AlignmentClient
from ray_app.store.pair_store import PairStore

NUM_PAIRS, NUM_DRIVES = 36, 9


def test_a_job_and_an_endpoint_outlive_a_node(tmp_path: Path) -> None:
    with (
        behind_haproxy() as environment,
        three_nodes(environment, cpus=2.0) as nodes,
        cluster_endpoint(nodes, make_checkpoint(tmp_path / "c"), tmp_path) as url,
    ):
        files = str(Path(environment["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]).parent)
        commands = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
        assert any("haproxy" in command and files in command for command in commands), commands
        stop, answers = threading.Event(), list[np.ndarray]()
        client = AlignmentClient(url, timeout_s=30.0)
        event = np.random.default_rng(0).integers(1, 256, (1, WIDTH), dtype=np.uint8)
        asking = threading.Thread(target=ask_until, args=(stop, client, event, answers))
        asking.start()
        store = prepare_while_a_node_dies(nodes, tmp_path / "store")
        until = time.monotonic() + 60
        while replicas(url) < 2:
            assert time.monotonic() < until
            time.sleep(0.2)
        before = len(answers)
        time.sleep(0.5)
        stop.set()
        asking.join()
    ids = store.index.sample_id.tolist()
    assert len(ids) == len(set(ids)) == NUM_PAIRS
    assert len(answers) > before > 0
    assert all(np.allclose(answer, answers[0], rtol=1e-2, atol=1e-3) for answer in answers)


def ask_until(stop: threading.Event, client: AlignmentClient, event: np.ndarray, answers: list[np.ndarray]) -> None:
    """An EndpointError ends it, and the number of answers stays where it is."""
    while not stop.is_set():
        answers.append(np.array(client.align(event).aligned_BD))
        time.sleep(0.02)


def prepare_while_a_node_dies(nodes: Nodes, out: Path) -> PairStore:
    """The store of `ray-app prepare` on the cluster; a node goes after its first file, and another comes."""
    words = (
        f"prepare scenes --out {out} --num-pairs {NUM_PAIRS} --num-sequences {NUM_DRIVES} --width 160 --height 120"
    )
    command = [sys.executable, "-m", "ray_app", *words.split(), "--json"]
    process = subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": nodes.address}, stdout=subprocess.DEVNULL)
    while not list(out.glob("*.parquet")):
        assert process.poll() is None
        time.sleep(0.02)
    nodes.kill(random.Random(0))
    assert process.poll() is None, "it had ended before the node did"
    nodes.add()
    assert process.wait(120) == 0
    return PairStore.open(out)

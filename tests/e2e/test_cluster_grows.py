"""A cluster that begins with no worker, and whose nodes come when a command asks for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from ray_app.cluster.autoscaler import WAIT_NODES_S, wait_for_autoscaler
from ray_app.cluster.connection import cluster

NODE = {"object_store_memory": 100 * 2**20}


def test_a_command_waits_for_the_nodes_that_it_asks_for(tmp_path: Path) -> None:
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **NODE})
    words = f"prepare scenes --out {tmp_path / 's'} --num-pairs 2 --num-sequences 2 --width 64 --height 48"
    process = subprocess.Popen(
        [sys.executable, "-m", "ray_app", *words.split(), "--event-span", "5ms", "--num-workers", "2", "--json"],
        env={**os.environ, "RAY_ADDRESS": nodes.address, WAIT_NODES_S: "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr
        output = next((line for line in process.stderr if "waiting" in line), "")
        assert "up to 100 s for nodes with 2 CPUs" in output
        nodes.add_node(num_cpus=2, **NODE)
        stdout, stderr = process.communicate(timeout=400)
    finally:
        process.kill()
        nodes.shutdown()
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["workers"] == 2


@pytest.mark.usefixtures("ray_cluster")
def test_nodes_that_do_not_come_are_waited_for_no_longer_and_wished_for_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with cluster(None) as info:
        assert wait_for_autoscaler(info, 3, 1.0, use_gpu=False) is info, "without the variable nothing is waited for"
        monkeypatch.setenv(WAIT_NODES_S, "1")
        assert wait_for_autoscaler(info, 2, 1.0, use_gpu=False) is info, "there is room"
        assert wait_for_autoscaler(info, 3, 1.0, use_gpu=False) == info
        assert wait_for_autoscaler(info, 1, 1.0, use_gpu=True) == info
    assert {group["state"] for group in ray.util.placement_group_table().values()} <= {"REMOVED"}

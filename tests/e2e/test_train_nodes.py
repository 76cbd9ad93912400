"""Nodes that a training cannot use are named before it starts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ray.cluster_utils import Cluster


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU on this machine")
def test_nodes_whose_gpus_torch_does_not_see_are_named(small_store: Path, tmp_path: Path) -> None:
    node = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        command = [
            sys.executable,
            "-m",
            "ray_app",
            "train",
            "--store",
            str(small_store),
            "--out",
            str(tmp_path / "run"),
        ]
        command += ["--num-workers", "2", "--use-gpu", "--address", cluster.address]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    finally:
        cluster.shutdown()
    assert done.returncode == 2, done.stderr
    said = " ".join(done.stderr.split())
    assert "torch sees no GPU on 2 of 2 nodes where Ray counts some" in said
    assert "install a driver and torch with CUDA there" in said
    assert not (tmp_path / "run").exists()

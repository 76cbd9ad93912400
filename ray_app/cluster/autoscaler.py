"""Wait for nodes that the cluster's autoscaler brings when they are asked for."""

import os
import sys

from ray.util import placement_group, remove_placement_group

from ray_app.cluster.resources import ClusterInfo, cluster_info

WAIT_NODES_S = "RAY_APP_WAIT_NODES_S"
"""Environment variable: seconds that a command waits for the autoscaler to bring the wanted nodes."""


def wait_for_autoscaler(info: ClusterInfo, num_workers: int, cpus_per_worker: float, use_gpu: bool) -> ClusterInfo:
    """Wait up to RAY_APP_WAIT_NODES_S for room for so many workers; return the cluster as it is then.

    Unset, nothing is waited for: most clusters do not grow. The request for nodes ends with this process.
    """
    wait_s = float(os.environ.get(WAIT_NODES_S) or 0)
    if not wait_s or (info.max_workers(cpus_per_worker) >= num_workers and (not use_gpu or info.gpus >= num_workers)):
        return info
    bundle = {"CPU": cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})}
    gpus = f", {num_workers} GPUs" if use_gpu else ""
    print(
        f"waiting up to {wait_s:g} s for nodes with {num_workers * cpus_per_worker:g} CPUs{gpus} ({WAIT_NODES_S})",
        file=sys.stderr,
        flush=True,
    )
    group = placement_group([bundle] * num_workers)
    try:
        group.wait(wait_s)
    finally:
        remove_placement_group(group)
    return cluster_info()

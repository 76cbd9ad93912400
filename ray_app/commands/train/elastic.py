"""What an elastic run asks of Ray Train's controller beside its policy, which counts the room in the cluster.

Ray ends a group of workers at once when it finds room for more, its count of the cluster is up to 20 s old, and its
head takes a node that has gone for alive for some 15 s more. So workers save before they are replaced, and after a
failure the cluster is counted anew, once no node is counted that does not answer: otherwise the next group waits a
minute for the node that has just gone. The hooks are Ray Train's own, not its public ones; Ray is pinned.
"""

import time
from contextlib import suppress
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ResizingState
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

from ray_app.cluster.reachability import node_is_alive
from ray_app.runs.event_log import POLL_S, entries
from ray_app.runs.run_dir import RunDir

PATIENCE_S = 120.0
"""For a step and a save; after it the group is replaced as it is, and goes on from the save before."""

LOST_S = 60.0
"""For the head to hear that a node has gone; after it the next group may have to wait for that."""

COUNT_S = 10.0
"""For counting the cluster."""


class ElasticResizeCallback(ControllerCallback):
    """Of one run; lives in the controller's process."""

    def __init__(self, run: RunDir) -> None:
        self._run = run

    def after_controller_state_update(self, _: Any, current: Any) -> None:
        """Workers that train are about to be replaced: until they have saved, this waits."""
        if not isinstance(current, ResizingState):
            return
        deadline = time.monotonic() + PATIENCE_S
        self._run.resize_file.touch()
        # An epoch's end is saved, too, and a worker that tells of it waits for this process.
        while entries(self._run.path)[-1]["kind"] not in ("stopped", "epoch") and time.monotonic() < deadline:
            time.sleep(POLL_S)
        self._run.resize_file.unlink()

    def before_controller_execute_failure_decision(self, _: Any) -> None:
        """A node may be gone: the next group is to be of what is there.

        Without an answer it takes Ray's old count.
        """
        deadline = time.monotonic() + LOST_S
        while not all(node_is_alive(node) for node in ray.nodes() if node["Alive"]) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        with suppress(RayError):
            counted = get_or_create_autoscaling_coordinator().get_reserved_resources.remote("", recompute=True)
            ray.get(counted, timeout=COUNT_S)
        time.sleep(ElasticScalingPolicy.GET_RESERVED_RESOURCES_INTERVAL_S)  # so long it keeps the count before

"""Elastic training: what a run adds to Ray Train's elastic policy, which counts the room in the cluster.

Ray ends a group of workers at once when it finds room for more; its count of the cluster is up to 20 s old, and its
head takes a lost node for alive for about 15 s more. So workers save before they are replaced, and after a failure
the cluster is counted again once every listed node answers: otherwise the next group waits a minute for a lost node.
"""

import time
from pathlib import Path
from typing import Any

import ray

from ray_app.cluster.ray_internals import COUNT_KEPT_S, ControllerCallback, is_resizing, recount_cluster
from ray_app.cluster.reachability import node_is_alive
from ray_app.runs.event_log import POLL_S, entries
from ray_app.runs.run_dir import RunDir

SAVE_S = 120.0
"""Longest wait for a step and a save, in seconds; after it workers are replaced unsaved."""
LOST_NODE_S = 60.0
"""Longest wait for Ray's head to notice lost nodes, in seconds."""


class ElasticResizeCallback(ControllerCallback):
    """Hooks of one run in the process of Ray Train's controller."""

    def __init__(self, path: Path) -> None:
        """`path`: folder of the run; an open one has a lock, which does not travel."""
        self._path = path

    def after_controller_state_update(self, _: Any, current: Any) -> None:
        """Before workers are replaced, request a save and wait for it."""
        if not is_resizing(current):
            return
        deadline, resize_file = time.monotonic() + SAVE_S, RunDir(self._path).resize_file
        resize_file.touch()
        # The end of an epoch is saved too, and a worker that reports it waits for this process.
        while entries(self._path)[-1]["kind"] not in ("stopped", "epoch") and time.monotonic() < deadline:
            time.sleep(POLL_S)
        resize_file.unlink()

    def before_controller_execute_failure_decision(self, _: Any) -> None:
        """After a failure, count the cluster once every node that Ray lists answers."""
        deadline = time.monotonic() + LOST_NODE_S
        while not all(node_is_alive(node) for node in ray.nodes() if node["Alive"]) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        recount_cluster()
        time.sleep(COUNT_KEPT_S)

"""Private names of Ray, and nothing else of this project touches any: written for the Ray that is pinned.

Elastic training needs hooks of Ray Train's controller, and the causes of failed workers are inside Ray's wrappers.
"""

from contextlib import suppress
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.exceptions import RayError
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ResizingState
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

__all__ = ["ControllerCallback"]

RAY_VERSION = "2.60.0"
"""Version of Ray that these names were read in."""
COUNT_S = 10.0
"""Longest wait for Ray to count the cluster, in seconds."""
COUNT_KEPT_S = float(ElasticScalingPolicy.GET_RESERVED_RESOURCES_INTERVAL_S)
"""How long the elastic policy uses a count of the cluster again, in seconds."""


def is_resizing(state: Any) -> bool:
    """Return True if a controller state means that workers that train are about to be replaced."""
    return isinstance(state, ResizingState)


def recount_cluster() -> None:
    """Make Ray count the cluster's resources now; without an answer its old count stays."""
    with suppress(RayError):
        count = get_or_create_autoscaling_coordinator().get_reserved_resources.remote("", recompute=True)
        ray.get(count, timeout=COUNT_S)


def is_startup_timeout(error: ControllerError) -> bool:
    """Return True if the workers of a training could not be started in time."""
    return isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)


def is_node_timeout(error: Exception) -> bool:
    """Return True if Ray gave up waiting for the node that it started: its 30 s are too short on a busy machine."""
    return type(error) is Exception and "timed out during startup" in str(error)


def unwrap_worker_failure(failure: Exception) -> Exception:
    """Return the exception of a worker's code, or of its health check, without Ray Train's wrapper."""
    cause: Any = getattr(failure, "_base_exc", None) or getattr(failure, "health_check_failure", failure)
    return cause

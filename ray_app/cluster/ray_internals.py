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
from ray.train import ControllerError, Result
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ResizingState
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

__all__ = ["ControllerCallback"]

RAY_VERSION = "2.60.0"
"""Version of Ray that these names were read in."""
COUNT_S = 10.0
"""Longest wait for Ray to count the cluster, in seconds."""
COUNT_KEPT_S = float(ElasticScalingPolicy.GET_RESERVED_RESOURCES_INTERVAL_S)
"""How long the elastic policy uses a count of the cluster again, in seconds."""


class OwnClusterPolicy(FixedScalingPolicy):
    """A fixed number of workers on a cluster that nothing makes larger: no nodes are requested."""

    def _send_resource_request(self) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        pass


class LeanTrainer(DataParallelTrainer):
    """Ray Train's trainer without processes that a run has no use for: each takes a core 1.3 s to start."""

    def __init__(self, *args: Any, own_cluster: bool, **kwargs: Any) -> None:
        """`own_cluster`: the cluster ends with this process: no workers are left to clean up, no nodes are added."""
        super().__init__(*args, **kwargs)
        self._own_cluster = own_cluster

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        needed = {DatasetsCallback: bool(self.datasets), PlacementGroupCleanerCallback: not self._own_cluster}
        return [callback for callback in callbacks if needed.get(type(callback), True)]

    def _initialize_and_run_controller(self, **kwargs: Any) -> Result:
        if self._own_cluster and not self.datasets:  # Ray Data counts what a training has requested
            kwargs["scaling_policy"] = OwnClusterPolicy(self.scaling_config)  # type: ignore[arg-type]  # typed as before Train V2
        return super()._initialize_and_run_controller(**kwargs)


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

"""The private names of Ray that `ray_internals` uses are those of the pinned version."""

import inspect
import os
import signal
import subprocess
from pathlib import Path

import pytest
import ray
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from ray_app.cluster import connection, env_defaults, ray_internals
from ray_app.cluster.connection import cluster
from ray_app.cluster.resources import ClusterInfo
from ray_app.commands.train.elastic import ElasticResizeCallback
from ray_app.errors import ResourceError


def test_ray_is_the_version_that_its_private_names_were_read_in() -> None:
    assert ray.__version__ == ray_internals.RAY_VERSION, "read every name of ray_internals.py again, then change it"


def test_the_hooks_of_elastic_training_are_hooks_of_the_controller() -> None:
    for name in ("after_controller_state_update", "before_controller_execute_failure_decision"):
        ours, rays = (getattr(kind, name) for kind in (ElasticResizeCallback, ray_internals.ControllerCallback))
        assert len(inspect.signature(ours).parameters) == len(inspect.signature(rays).parameters)


def test_the_cause_of_a_failed_worker_is_unwrapped() -> None:
    cause = ValueError("ours")
    assert ray_internals.unwrap_worker_failure(UserExceptionWithTraceback(cause, "Traceback")) is cause
    assert ray_internals.unwrap_worker_failure(WorkerHealthCheckFailedError("gone", cause)) is cause
    assert ray_internals.unwrap_worker_failure(cause) is cause


@pytest.mark.parametrize("own_cluster", [True, False])
def test_a_trainer_starts_only_processes_that_a_run_needs(own_cluster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer(datasets: dict[str, object]) -> ray_internals.LeanTrainer:
        return ray_internals.LeanTrainer(print, datasets=datasets, own_cluster=own_cluster)

    kinds = {type(callback) for callback in trainer({"train": None})._create_default_callbacks()}
    alone = {type(callback) for callback in trainer({})._create_default_callbacks()}
    assert DatasetsCallback in kinds
    assert kinds - alone == {DatasetsCallback}
    assert (PlacementGroupCleanerCallback in kinds) is not own_cluster
    given: dict[str, object] = {}
    monkeypatch.setattr(
        DataParallelTrainer, "_initialize_and_run_controller", lambda _, **kwargs: given.update(kwargs)
    )
    trainer({})._initialize_and_run_controller(scaling_policy=None)
    assert isinstance(given["scaling_policy"], ray_internals.OwnClusterPolicy) is own_cluster
    trainer({"train": None})._initialize_and_run_controller(scaling_policy=None)
    assert given["scaling_policy"] is None


def test_a_policy_of_an_own_cluster_overrides_methods_that_ray_has() -> None:
    ours = {name for name in vars(ray_internals.OwnClusterPolicy) if name.endswith("_request")}
    assert ours == {name for name in dir(FixedScalingPolicy) if name.endswith("_resource_request")} - {
        "_get_num_workers_for_resource_request"
    }


TOO_SLOW = "The current node timed out during startup. This could happen because"


def test_ray_that_does_not_start_on_a_busy_machine_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TOO_SLOW.partition(".")[0] in " ".join(inspect.getsource(ray._private.node).replace('"', " ").split())
    starts = []

    def start(**_: object) -> None:
        starts.append(subprocess.Popen(["sleep", "600"]))
        raise Exception(TOO_SLOW)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", start)
    with pytest.raises(ResourceError, match="Ray did not start on this machine in 3 times 30 s"), cluster("local"):
        pass
    assert len(starts) == 3
    starts.pop().kill()  # those of the last one end with the command
    assert all(process.wait(timeout=60) == -signal.SIGKILL for process in starts)


def test_workers_of_an_own_cluster_are_not_nice(monkeypatch: pytest.MonkeyPatch) -> None:
    raylet = Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet"
    assert b"RAY_worker_niceness" in raylet.read_bytes()
    assert set(env_defaults.OWN_CLUSTER) == {"RAY_worker_niceness", ENABLE_PREEMPTION_WATCHER_ENV_VAR}
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(connection, "cluster_info", lambda: ClusterInfo(2.0, 0.0, 0.0, (2.0,)))
    monkeypatch.setattr(connection, "keep_token_private", lambda: None)
    with cluster("auto") as info:
        assert not info.own
    assert not environment
    with cluster("local") as info:
        assert info.own
    assert environment == env_defaults.OWN_CLUSTER


def test_ray_that_starts_at_the_second_attempt_is_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = [Exception(TOO_SLOW), None]

    def start(**_: object) -> None:
        if (error := outcomes.pop(0)) is not None:
            raise error

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(connection, "cluster_info", lambda: "connected")
    with cluster("auto") as info:
        assert info == "connected"
    assert not outcomes
    assert "trying again" in capsys.readouterr().err

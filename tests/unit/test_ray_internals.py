"""The private names of Ray that `ray_internals` uses are those of the pinned version."""

import inspect
import signal
import subprocess

import pytest
import ray
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

from ray_app.cluster import connection, ray_internals
from ray_app.cluster.connection import cluster
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

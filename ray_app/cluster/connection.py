"""The Ray cluster of a command: a running one, or one of its own on this machine."""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import psutil
import ray
from ray.data import Dataset
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError
from ray.train import ControllerError, TrainingFailedError

from ray_app.cluster.env_defaults import OWN_CLUSTER, set_where_unset
from ray_app.cluster.interrupts import interrupt_after
from ray_app.cluster.private_folder import keep_token_private, private_folder
from ray_app.cluster.ray_internals import is_node_timeout, is_startup_timeout
from ray_app.cluster.reachability import connection_error
from ray_app.cluster.resources import ClusterInfo, cluster_info
from ray_app.errors import RayAppError, ResourceError

BUSY_HINT = "Something else may hold the cluster's CPUs (see `ray status`); wait for it, or ask for less."
START_ATTEMPTS = 3
"""Ray waits 30 s for its own node, and nothing sets that; on a busy machine it takes longer."""
LONGEST_TASK_S = 1800.0
"""Seconds without the end of any task after which the tasks of a command are given up."""


@contextmanager
def cluster(address: str | None, *, dashboard: bool = False) -> Iterator[ClusterInfo]:
    """Yield the connected cluster, else the one at `address` or RAY_ADDRESS, else a new one on this machine.

    `dashboard`: a new one has it. Ray Train asks it whether an interrupted run is alive; without an answer the CPUs
    of its workers stay taken. Only a connection that was made here is closed at the end. An error of ours that Ray
    wrapped in a worker is raised as itself. ResourceError: no cluster at the address, or one of another version.
    """
    with unwrap_user_errors():
        if ray.is_initialized():
            yield cluster_info()
            return
        for chatty in ("ray.data", "ray.train"):
            logging.getLogger(chatty).setLevel(logging.ERROR)
        where = address or os.environ.get("RAY_ADDRESS") or "local"
        if where not in ("local", "auto") and (reason := connection_error(where)):
            raise ResourceError(_no_cluster(where, reason))
        if where == "local":
            print("starting Ray on this machine", file=sys.stderr)
        try:
            with interrupt_after():
                _connect(where, dashboard)
        except (ConnectionError, RayError) as error:
            raise ResourceError(_no_cluster(where, str(error).splitlines()[0])) from error
        except OSError as error:
            raise ResourceError(
                f"Ray cannot start: {error}; set HOME and TMPDIR to folders that can be written (`ray-app doctor` "
                "says more)"
            ) from error
        except RuntimeError as error:
            if versions := re.findall(r"Ray: (\S+)\s+Python: (\S+)", str(error)):  # its own are plain RuntimeErrors
                raise ResourceError(_other_version(where, *versions)) from error
            raise
        try:
            info = cluster_info()
            if where == "local":
                info = replace(info, own=True)
                keep_token_private()
                print(f"started Ray on this machine: {info.cpus:g} CPUs, {info.gpus:g} GPUs", file=sys.stderr)
            yield info
        finally:
            ray.shutdown()


def _connect(where: str, dashboard: bool) -> None:
    """Start Ray, or connect to it. A start that takes too long on a busy machine is ended and tried again."""
    local, before = where == "local", set(psutil.Process().children())
    if local:
        set_where_unset(OWN_CLUSTER)
    for attempts_left in reversed(range(START_ATTEMPTS)):
        try:
            ray.init(
                address=where,
                logging_level=logging.ERROR,
                log_to_driver=False,
                include_dashboard=dashboard if local else None,
                _temp_dir=str(private_folder() / "ray") if local else None,
            )
            return
        except Exception as error:
            if not is_node_timeout(error) or not attempts_left:
                raise
        for child in set(psutil.Process().children()) - before:  # Ray ends them with this process only
            with suppress(psutil.NoSuchProcess):
                child.kill()
        print("Ray did not start within 30 s, trying again", file=sys.stderr)


def allow_long_tasks(dataset: Dataset) -> Dataset:
    """Let a task take LONGEST_TASK_S, where Ray Data sees no progress but its end. Training keeps a shorter limit."""
    dataset.context.execution_no_progress_timeout_s = LONGEST_TASK_S
    return dataset


def _no_cluster(where: str, reason: str) -> str:
    return (
        f"there is no Ray cluster at '{where}' that lets this user in ({reason}); name another with --address, or "
        "unset RAY_ADDRESS to start one on this machine (`ray-app doctor` says more)"
    )


def _other_version(where: str, theirs: tuple[str, str], ours: tuple[str, str]) -> str:
    return (
        f"the cluster at {where} runs Ray {theirs[0]} on Python {theirs[1]}, this is Ray {ours[0]} on Python "
        f"{ours[1]}, and Ray takes no others; run this in the image of its nodes, or by `ray-app submit`"
    )


@contextmanager
def unwrap_user_errors() -> Iterator[None]:
    """Raise an error of ours inside one of Ray's as itself, a cluster that is full or too slow as ResourceError."""
    try:
        yield
    except ExecutionTimeoutError as error:
        raise ResourceError(f"Ray Data's tasks got nowhere for too long. {BUSY_HINT}") from error
    except ControllerError as error:
        if is_startup_timeout(error):
            raise ResourceError(f"The training workers could not be started in time. {BUSY_HINT}") from error
        raise
    except (RayError, TrainingFailedError) as error:
        if (ours := find_user_error(error)) is not None:
            raise ours from error
        raise
    except Exception as error:
        if is_node_timeout(error):
            raise ResourceError(
                f"Ray did not start on this machine in {START_ATTEMPTS} times 30 s; other programs may keep it busy. "
                "Try again when they have ended, or start Ray first (`ray start --head`) and set RAY_ADDRESS=auto."
            ) from error
        raise


def find_user_error(error: BaseException) -> RayAppError | None:
    """Return the error of ours in a chain of causes, or None."""
    queue: list[BaseException | None] = [error]
    seen: set[int] = set()
    while queue:
        this = queue.pop()
        if isinstance(this, RayAppError):
            return _bare(this)
        if this is None or id(this) in seen:
            continue
        seen.add(id(this))
        queue += [this.__cause__, this.__context__, getattr(this, "cause", None)]
        queue += getattr(this, "worker_failures", {}).values()
    return None


def _bare(error: RayAppError) -> RayAppError:
    """Undo Ray's wrapping: a class made of the error's class and RayTaskError, and advice of Ray Data in its text."""
    plain = next(cls for cls in type(error).__mro__ if cls.__module__ == RayAppError.__module__)
    cause = getattr(error, "cause", None)
    text = (cause if isinstance(cause, RayAppError) else error).args[0]
    return plain(text.partition("\nFailed to apply")[0])

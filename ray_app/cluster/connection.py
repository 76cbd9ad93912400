"""The Ray cluster of a command: a running one, or one of its own; and whether it is large enough."""

import logging
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError
from ray.train import ControllerError, TrainingFailedError
from ray.util import placement_group, remove_placement_group

from ray_app.cluster.ray_internals import is_startup_timeout
from ray_app.cluster.reachability import connection_error
from ray_app.errors import RayAppError, ResourceError

WAIT_NODES_S = "RAY_APP_WAIT_NODES_S"
"""Environment variable: seconds that a command waits for the autoscaler to bring the wanted nodes."""
BUSY_HINT = "Something else may hold the cluster's CPUs (see `ray status`); wait for it, or ask for less."


@dataclass(frozen=True, slots=True)
class ClusterInfo:
    """Resources of a cluster."""

    cpus: float
    """Number of CPUs."""
    gpus: float
    """Number of GPUs."""
    memory_bytes: float
    """Memory that tasks and workers may claim."""
    node_cpus: tuple[float, ...]
    """CPUs of each node: a worker is on one node."""
    node_memory_bytes: tuple[float, ...] = ()
    """Memory of each node, in the same order."""

    def max_workers(self, cpus_per_worker: float, data_cpus: float = 0.0) -> int:
        """Return how many workers of so many CPUs fit, with `data_cpus` kept free on the largest node."""
        *nodes, largest = sorted(self.node_cpus)
        return sum(int(cpus / cpus_per_worker + 1e-9) for cpus in (*nodes, max(largest - data_cpus, 0.0)))

    def max_cpus_per_worker(self, num_workers: int, data_cpus: float) -> float:
        """Return the most CPUs that each of so many workers can have: a whole number from 1 on."""
        *nodes, largest = sorted(self.node_cpus)
        shares = [cpus / k for cpus in (*nodes, largest - data_cpus) for k in range(1, num_workers + 1)]
        fitting = [share for share in shares if share > 0 and self.max_workers(share, data_cpus) >= num_workers]
        best = max(fitting, default=0.1)
        return float(int(best)) if best >= 1 else max(math.floor(best * 100) / 100, 0.01)


@contextmanager
def cluster(address: str | None, *, dashboard: bool = False) -> Iterator[ClusterInfo]:
    """Yield the connected cluster, else the one at `address` or RAY_ADDRESS, else a new one on this machine.

    `dashboard`: a new one has it. Ray Train asks it whether an interrupted run is alive; without an answer the CPUs
    of its workers stay taken. Only a connection that was made here is closed at the end. An error of ours that Ray
    wrapped in a worker is raised as itself. ResourceError: no cluster at the address, or one of another version.
    """
    with unwrap_user_errors():
        if ray.is_initialized():
            yield _info()
            return
        for chatty in ("ray.data", "ray.train"):
            logging.getLogger(chatty).setLevel(logging.ERROR)
        where = address or os.environ.get("RAY_ADDRESS") or "local"
        if where not in ("local", "auto") and (reason := connection_error(where)):
            raise ResourceError(_no_cluster(where, reason))
        try:
            ray.init(
                address=where,
                logging_level=logging.ERROR,
                log_to_driver=False,
                include_dashboard=dashboard if where == "local" else None,
            )
        except (ConnectionError, RayError) as error:
            raise ResourceError(_no_cluster(where, str(error).splitlines()[0])) from error
        except RuntimeError as error:
            if versions := re.findall(r"Ray: (\S+)\s+Python: (\S+)", str(error)):  # its own are plain RuntimeErrors
                raise ResourceError(_other_version(where, *versions)) from error
            raise
        try:
            info = _info()
            if where == "local":
                _keep_token_private()
                print(f"started Ray on this machine: {info.cpus:g} CPUs, {info.gpus:g} GPUs", file=sys.stderr)
            yield info
        finally:
            ray.shutdown()


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
    """Raise an error of ours inside one of Ray's as itself, and a full cluster as ResourceError."""
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
    return _info()


def require_resources(
    info: ClusterInfo,
    *,
    num_workers: int,
    cpus_per_worker: float,
    use_gpu: bool,
    data_cpus: float,
    memory_bytes: float,
) -> None:
    """Raise ResourceError if the workers and their data need more than the cluster has.

    Ray would wait in silence: on 2 CPUs two workers of one CPU each leave none to Ray Data. `data_cpus`: needed to
    stream the pairs; `memory_bytes`: held by all workers.
    """
    if use_gpu and info.gpus < num_workers:
        raise ResourceError(
            f"--use-gpu with --num-workers {num_workers} needs {num_workers} GPUs, the cluster has {info.gpus:g}; "
            "take fewer workers, or leave --use-gpu out"
        )
    if info.max_workers(cpus_per_worker, data_cpus) < num_workers:
        data = f" and {data_cpus:g} to stream the data" if data_cpus else ""
        nodes = f" on {len(info.node_cpus)} nodes" if len(info.node_cpus) > 1 else ""
        asked, share = num_workers * cpus_per_worker + data_cpus, info.max_cpus_per_worker(num_workers, data_cpus)
        raise ResourceError(
            f"{num_workers} workers of {cpus_per_worker:g} CPUs{data} need {asked:g} CPUs, the cluster has "
            f"{info.cpus:g}{nodes}; take fewer --num-workers, or --cpus-per-worker {share:g}"
            + (", or hold the data in memory with a larger --shard-memory-gib" if data_cpus else "")
        )
    if memory_bytes > info.memory_bytes:
        raise ResourceError(
            f"training would hold about {memory_bytes / 2**30:.1f} GiB, the cluster has "
            f"{info.memory_bytes / 2**30:.1f} GiB for it; take a smaller --hidden-dim, another --strategy, or "
            "fewer --num-workers"
        )


def _info() -> ClusterInfo:
    total = ray.cluster_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, memory = (tuple(node.get(name, 0.0) for node in nodes) for name in ("CPU", "memory"))
    return ClusterInfo(total.get("CPU", 0.0), total.get("GPU", 0.0), total.get("memory", 0.0), cpus, memory)


def _keep_token_private() -> None:
    """Restrict the token file, which Ray writes readable by everyone on the machine."""
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file() and token.stat().st_uid == os.getuid():
        token.chmod(0o600)

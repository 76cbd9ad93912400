"""The Ray cluster of a command: the one it is told of, or one of its own; and whether it is large enough."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.train import TrainingFailedError

from ray_app.errors import RayAppError, ResourceError


@dataclass(frozen=True, slots=True)
class ClusterInfo:
    """What a cluster has in all."""

    cpus: float
    """CPUs."""
    gpus: float
    """GPUs."""
    memory_bytes: float
    """Memory that tasks and workers may claim."""


@contextmanager
def cluster(address: str | None) -> Iterator[ClusterInfo]:
    """The connected cluster, else the one at `address` or RAY_ADDRESS, else a new one on this machine.

    Only a connection that was made here is closed at the end. An error of ours that Ray has wrapped on its
    way from a worker is raised as itself. ResourceError: no cluster at the address.
    """
    with user_errors():
        if ray.is_initialized():
            yield _info()
            return
        for chatty in ("ray.data", "ray.train"):
            logging.getLogger(chatty).setLevel(logging.ERROR)
        where = address or os.environ.get("RAY_ADDRESS") or "local"
        try:
            ray.init(
                address=where,
                logging_level=logging.ERROR,
                log_to_driver=False,
                include_dashboard=False if where == "local" else None,
            )
        except (ConnectionError, RayError) as error:
            raise ResourceError(
                f"there is no Ray cluster at '{where}' ({str(error).splitlines()[0]}); name another with --address, "
                "or unset RAY_ADDRESS to start one on this machine"
            ) from error
        try:
            info = _info()
            if where == "local":
                _keep_token_private()
                print(f"started Ray on this machine: {info.cpus:g} CPUs, {info.gpus:g} GPUs", file=sys.stderr)
            yield info
        finally:
            ray.shutdown()


@contextmanager
def user_errors() -> Iterator[None]:
    """An error of ours inside an error of Ray's is raised as itself."""
    try:
        yield
    except (RayError, TrainingFailedError) as error:
        if (mendable := find_user_error(error)) is not None:
            raise mendable from error
        raise


def find_user_error(error: BaseException) -> RayAppError | None:
    """The error of ours in a chain of causes, or None."""
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
    """Ray makes a class of its own out of an error's class and RayTaskError; this is the plain one again."""
    plain = next(cls for cls in type(error).__mro__ if cls.__module__ == RayAppError.__module__)
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, RayAppError) else plain(*error.args)


def require(
    info: ClusterInfo,
    *,
    num_workers: int,
    cpus_per_worker: float,
    use_gpu: bool,
    data_cpus: float,
    memory_bytes: float,
) -> None:
    """ResourceError, in one sentence, where the workers and what feeds them ask for more than there is.

    Without this they would wait in silence: on 2 CPUs two workers of one CPU each leave none to Ray Data.
    `data_cpus` is what streaming needs beside the workers; `memory_bytes` what all workers hold.
    """
    if use_gpu and info.gpus < num_workers:
        raise ResourceError(
            f"--use-gpu with --num-workers {num_workers} needs {num_workers} GPUs, the cluster has {info.gpus:g}; "
            "take fewer workers, or leave --use-gpu out"
        )
    asked = num_workers * cpus_per_worker + data_cpus
    if asked > info.cpus:
        data = f" and {data_cpus:g} to stream the data" if data_cpus else ""
        raise ResourceError(
            f"{num_workers} workers of {cpus_per_worker:g} CPUs{data} need {asked:g} CPUs, the cluster has "
            f"{info.cpus:g}; take fewer --num-workers, or --cpus-per-worker "
            f"{max(info.cpus - data_cpus, 0.5) / num_workers:g}"
        )
    if memory_bytes > info.memory_bytes:
        raise ResourceError(
            f"training would hold about {memory_bytes / 2**30:.1f} GiB, the cluster has "
            f"{info.memory_bytes / 2**30:.1f} GiB for it; take a smaller --hidden-dim, another --strategy, or "
            "fewer --num-workers"
        )


def _info() -> ClusterInfo:
    total = ray.cluster_resources()
    return ClusterInfo(total.get("CPU", 0.0), total.get("GPU", 0.0), total.get("memory", 0.0))


def _keep_token_private() -> None:
    """Ray writes the key to its clusters readable by everyone on the machine."""
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file() and token.stat().st_uid == os.getuid():
        token.chmod(0o600)

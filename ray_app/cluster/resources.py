"""Resources of a cluster: what workers fit, and whether a training fits at all."""

import math
from dataclasses import dataclass

import psutil
import ray

from ray_app.errors import ResourceError


def free_memory_bytes() -> int:
    """Return the memory of this machine that is available."""
    return int(psutil.virtual_memory().available)


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
    own: bool = False
    """This process started the cluster, and it ends with this process."""

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

    def max_workers_in_memory(self, cpus_per_worker: float, worker_bytes: float) -> int:
        """Return how many workers of so many CPUs and so much memory fit: each is on one node."""
        memory = self.node_memory_bytes or (self.memory_bytes,) * len(self.node_cpus)
        return sum(
            min(int(cpus / cpus_per_worker + 1e-9), int(num_bytes // worker_bytes))
            for cpus, num_bytes in zip(self.node_cpus, memory, strict=True)
        )


def cluster_info() -> ClusterInfo:
    """Return the resources of the nodes that are alive."""
    total = ray.cluster_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, memory = (tuple(node.get(name, 0.0) for node in nodes) for name in ("CPU", "memory"))
    return ClusterInfo(total.get("CPU", 0.0), total.get("GPU", 0.0), total.get("memory", 0.0), cpus, memory)


def require_resources(
    info: ClusterInfo,
    *,
    num_workers: int,
    cpus_per_worker: float,
    use_gpu: bool,
    data_cpus: float,
    worker_bytes: float,
) -> None:
    """Raise ResourceError if the workers and their data need more than the cluster has.

    Ray would wait in silence: on 2 CPUs two workers of one CPU each leave none to Ray Data. `data_cpus`: needed to
    stream the pairs; `worker_bytes`: held by each worker, at least 1.
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
    if (fit := info.max_workers_in_memory(cpus_per_worker, worker_bytes)) < num_workers:
        nodes = ", ".join(f"{size / 2**30:.1f}" for size in info.node_memory_bytes or (info.memory_bytes,))
        raise ResourceError(
            f"each of {num_workers} workers would hold {worker_bytes / 2**30:.1f} GiB of weights, moments and pairs, "
            f"and the nodes have {nodes} GiB for workers: room for {fit}; take a smaller --hidden-dim, another "
            "--strategy, more nodes with workers that divide the features (--parallelism feature), or a smaller "
            "--shard-memory-gib, which streams the pairs"
        )

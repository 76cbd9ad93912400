"""Needs of a run from the cluster and the disk, by arithmetic, before anything is started."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_app.cluster.autoscaler import wait_for_autoscaler
from ray_app.cluster.resources import ClusterInfo, require_resources
from ray_app.commands.train.context import RunContext
from ray_app.config.train import TrainConfig
from ray_app.errors import ConfigError, ResourceError
from ray_app.runs.run_dir import NUM_CHECKPOINTS_KEPT

WEIGHTS_AND_MOMENTS_BYTES = 16
"""Bytes of each parameter: weight, gradient and AdamW's two moments in float32."""
GPU_CHECK_S = 60.0
"""Longest wait for the nodes to look for their GPUs, in seconds."""


@dataclass(frozen=True, slots=True)
class ResourcePlan:
    """Resources that each worker of a run takes."""

    in_memory: bool
    """A worker holds its training pairs in memory; otherwise it streams them each epoch."""
    cpus_per_worker: float
    """CPUs that a worker claims."""

    @property
    def threads(self) -> int:
        """Threads that a worker computes with."""
        return max(1, int(self.cpus_per_worker))


def make_plan(context: RunContext, folder: Path, info: ClusterInfo) -> ResourcePlan:
    """Plan a run whose files go to `folder`; wait for the autoscaler first, where the cluster has one.

    ConfigError: streaming cannot give the wanted batches. ResourceError: the cluster or the disk is too small.
    """
    cfg, shard_bytes = context.cfg, context.division.shard_bytes
    in_memory = shard_bytes <= cfg.shard_memory_gib * 2**30
    if not in_memory:
        _require_streamable(cfg, shard_bytes)
    info = wait_for_autoscaler(info, cfg.min_workers, cfg.cpus_per_worker or 1.0, cfg.use_gpu)
    data_cpus = 0.0 if in_memory else 1.0
    share = 1.0 if cfg.use_gpu else info.max_cpus_per_worker(cfg.max_workers, data_cpus)
    share = max(share, 1.0) if cfg.elastic else share  # Ray's elastic policy counts whole CPUs
    slices = cfg.min_workers if context.division.parallelism == "feature" else 1
    plan = ResourcePlan(in_memory, cfg.cpus_per_worker or share)
    require_resources(
        info,
        num_workers=cfg.min_workers,
        cpus_per_worker=plan.cpus_per_worker,
        use_gpu=cfg.use_gpu,
        data_cpus=data_cpus,
        worker_bytes=context.parameters * WEIGHTS_AND_MOMENTS_BYTES / slices + (shard_bytes if in_memory else 0),
    )
    if cfg.use_gpu:
        require_visible_gpus()
    needs = DiskNeeds.of(context)
    _require_disk(needs.peak_bytes, context.parameters, folder)
    print(needs, file=sys.stderr)
    return plan


def _require_streamable(cfg: TrainConfig, shard_bytes: int) -> None:
    """ConfigError if workers that stream cannot see the wanted global batches."""
    larger = f"a --shard-memory-gib of {shard_bytes / 2**30:.3g} or more holds the pairs"
    if cfg.elastic:
        raise ConfigError(
            f"--num-workers {cfg.num_workers} keeps the global batches only where workers hold their pairs, "
            f"and {cfg.min_workers} would have to hold {shard_bytes / 2**30:.3g} GiB each: {larger}, "
            "or take a larger MIN"
        )
    if cfg.batch_size % cfg.min_workers:
        low = cfg.batch_size // cfg.min_workers * cfg.min_workers
        raise ConfigError(
            f"workers that stream need a --batch-size ({cfg.batch_size}) that is a multiple of --num-workers "
            f"({cfg.num_workers}); try {low} or {low + cfg.min_workers}, or {larger}"
        )


@dataclass(frozen=True, slots=True)
class DiskNeeds:
    """Bytes of a run's checkpoints."""

    peak_bytes: int
    """Most while it trains: what is kept, and the checkpoint being written."""
    end_bytes: int
    """Most at its end: the last state, its weights, and the best weights."""

    @classmethod
    def of(cls, context: RunContext) -> Self:
        """Compute the bytes of a run."""
        weights, moments = context.parameters * 4 + context.buffer_bytes, context.parameters * 8
        kept = NUM_CHECKPOINTS_KEPT  # whole, with the weights that were the best at each
        return cls((2 * kept + 1) * weights + (kept + 1) * moments, 2 * weights + moments)

    def __str__(self) -> str:
        peak, end = (
            f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
            for size in (self.peak_bytes, self.end_bytes)
        )
        return f"checkpoints take at most {peak} of disk while training, {end} at its end"


def _require_disk(needed: int, parameters: int, folder: Path) -> None:
    """ResourceError if the checkpoints of a run do not fit on the disk of `folder`."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        raise ResourceError(
            f"checkpoints of {parameters:,} parameters need {needed / 2**30:.1f} GiB in {existing}, "
            f"{free / 2**30:.1f} GiB are free; free some, or choose another --out (of a run at a URI: another TMPDIR)"
        )


def require_visible_gpus() -> None:
    """Raise ResourceError if torch sees no GPU on a node where Ray counts one; a node that is busy is not asked.

    A worker there would compute on a CPU, and wait for others that talk between GPUs.
    """
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    look = ray.remote(num_cpus=0, num_gpus=1)(describe_blind_node)
    on_each = [look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)) for node in nodes]
    asked = [task.remote() for task in on_each]
    answered, waiting = ray.wait(asked, num_returns=len(asked), timeout=GPU_CHECK_S)
    for task in waiting:
        ray.cancel(task)
    if blind := sorted(filter(None, ray.get(answered))):
        raise ResourceError(
            f"--use-gpu: torch sees no GPU on {len(blind)} of {len(nodes)} nodes where Ray counts some "
            f"({', '.join(blind)}), and workers cannot compute on GPUs and CPUs together; install a driver and torch "
            "with CUDA there, start these nodes with --num-gpus 0, or leave --use-gpu out"
        )


def describe_blind_node() -> str:
    """Return this node's address and torch's version if torch sees no GPU here; else an empty text."""
    return "" if torch.cuda.is_available() else f"{ray.util.get_node_ip_address()} with torch {torch.__version__}"

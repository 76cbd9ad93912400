"""Needs of a sweep, before its first trial: memory by arithmetic, time from one measured training step.

Shapes: B = pairs of a batch, E, D = widths of event and target.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import ray
import torch

from ray_app.cluster.resources import ClusterInfo
from ray_app.commands.train.context import RunContext
from ray_app.commands.train.plan import WEIGHTS_AND_MOMENTS_BYTES
from ray_app.commands.train.shared_dataset import SharedDataset
from ray_app.commands.train.state import make_objective
from ray_app.commands.tune.searchers import grid, sample_random
from ray_app.commands.tune.spec import (
    Choice,
    Setting,
    Space,
    SweepSpec,
    data_key,
    describe_space,
    space_of,
    train_config,
)
from ray_app.core.adapters.registry import build_adapter
from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.core.optimizer_step import make_optimizer, training_step
from ray_app.errors import ConfigError, ResourceError
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs

PROCESS_BYTES = 2**30
"""Memory of a trial's process without its model: Python, torch, Ray, the activations of a batch."""
SAMPLED_SETTINGS = 64
"""Random settings that the estimate averages over."""
STEPS = 3
"""Timed steps, after one that is not timed."""
LEARNING_RATE = 1e-6
"""Learning rate of the timed steps: too small for them to fail."""
SAVED_BYTES_PER_S = 3e8
"""Assumed speed of writing, hashing and syncing a checkpoint."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Rough cost of a sweep."""

    trials: int
    """Number of trials."""
    concurrent: int
    """Trials at a time."""
    hours: float
    """Hours if each trial runs all its epochs."""
    hours_expected: float
    """Hours if the scheduler stops as many trials as it is meant to."""
    gpu_hours: float
    """GPU hours if each trial runs all its epochs."""
    final_hours: float
    """Hours of the final training of the winner, all seeds."""
    measured: str
    """Measurements that it is computed from, in words."""


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Memory of one worker of a trial."""

    parameters: int
    """Trained numbers."""
    buffers: int
    """Bytes of the adapter's other tensors."""
    setting: Setting
    """Setting that needs it."""

    @property
    def num_bytes(self) -> int:
        """Bytes with gradients, moments and the process itself."""
        return self.parameters * WEIGHTS_AND_MOMENTS_BYTES + self.buffers + PROCESS_BYTES


def candidates(spec: SweepSpec) -> list[Setting]:
    """Settings that represent the space: all of a grid, else random ones."""
    space = space_of(spec)
    if spec.search_alg == "grid":
        return grid(space)[: spec.max_trials]
    return [
        setting for k in range(SAMPLED_SETTINGS) if (setting := sample_random(space, spec.seed + k, [])) is not None
    ]


def corners(space: Space) -> list[Setting]:
    """Settings that include the largest adapter: numbers at their maximum, with every choice of anything else."""
    values = []
    for dimension in space.values():
        bounds = dimension.bounds
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in bounds)
        values.append([max(bounds)] if numbers else list(bounds))
    return [
        dict(zip(space, combination, strict=True))
        for combination in itertools.islice(itertools.product(*values), 512)
    ]


def accepted_contexts(
    spec: SweepSpec, settings: Iterable[Setting], placed: Mapping[str, SharedDataset]
) -> Iterator[RunContext]:
    """Contexts of the settings that `train` accepts; a trial of any other fails at once."""
    for setting in settings:
        with contextlib.suppress(ConfigError):
            cfg = train_config(spec, setting, spec.out)
            part = placed[data_key(cfg)]
            yield RunContext.of(cfg, part.store, part.split)


def largest(spec: SweepSpec, store: PairStore) -> MemoryNeed:
    """The setting that needs most memory."""
    space = space_of(spec)
    grid_like = all(isinstance(dimension, Choice) for dimension in space.values())
    size = math.prod(len(d.values) for d in space.values() if isinstance(d, Choice))
    settings = grid(space) if grid_like and size <= 512 else corners(space) + candidates(spec)
    needs, split = [], split_pairs(store.index, spec.split_config)
    for setting in settings:
        try:
            context = RunContext.of(train_config(spec, setting, spec.out), store, split)
            needs.append(MemoryNeed(context.parameters, context.buffer_bytes, setting))
        except ConfigError:  # a combination that is never run
            continue
    if not needs:
        raise ConfigError("`train` refuses every combination of this space; change `space` or `base`")
    return max(needs, key=lambda need: need.num_bytes)


def max_concurrent(spec: SweepSpec, info: ClusterInfo, placed: dict[str, SharedDataset], most: MemoryNeed) -> int:
    """Trials at a time that the cluster has room for if each is the largest of the space.

    ResourceError, with the setting: not one fits. Each worker must fit on one node.
    """
    if spec.use_gpu and info.gpus < spec.num_workers:
        raise ResourceError(
            f"a trial wants {spec.num_workers} GPUs, the cluster has {info.gpus:g}; take `use_gpu: false` or "
            "fewer `num_workers`"
        )
    if info.max_workers(spec.cpus_per_worker) < spec.num_workers:
        raise ResourceError(
            f"a trial wants {spec.num_workers} workers of {spec.cpus_per_worker:g} CPUs, the cluster has "
            f"{info.cpus:g} CPUs in all; take fewer `num_workers` or `cpus_per_worker`"
        )
    memory = info.node_memory_bytes or (info.memory_bytes,) * len(info.node_cpus)
    workers = sum(
        min(int(cpus / spec.cpus_per_worker + 1e-9), int(num_bytes // most.num_bytes))
        for cpus, num_bytes in zip(info.node_cpus, memory, strict=True)
    )
    if workers < spec.num_workers:
        shared = sum(part.num_bytes for part in placed.values()) / 2**30
        buffers = f" and {most.buffers / 2**30:.1f} GiB of other tensors" if most.buffers else ""
        raise ResourceError(
            f"the space cannot fit the memory: {describe_space(most.setting)} has "
            f"{most.parameters:,} parameters{buffers}, which take {most.num_bytes / 2**30:.1f} GiB in each of "
            f"{spec.num_workers} workers, with {shared:.1f} GiB of shared pairs; "
            f"the largest node has {max(memory) / 2**30:.1f} GiB for it. "
            "Take a smaller `hidden_dim` or `rank`, or another `strategy`."
        )
    fit = min([workers // spec.num_workers, *([int(info.gpus // spec.num_workers)] if spec.use_gpu else [])])
    return min(fit, spec.max_concurrent_trials) if spec.max_concurrent_trials else fit


def estimate_sweep(spec: SweepSpec, placed: dict[str, SharedDataset], concurrent: int) -> Estimate:
    """Estimate from a measured step of each strategy, of its fewest parameters, scaled by parameters and pairs.

    Validation counts as a third of a step for each batch; the time of a checkpoint is assumed, not measured. The
    final training is taken to be of an average setting, with all epochs, on as many CPUs as a trial has.
    """
    settings, data = candidates(spec), next(iter(placed.values()))
    trials = len(settings) if spec.search_alg == "grid" else spec.max_trials
    sized = [(context.parameters or 1, context) for context in accepted_contexts(spec, settings, placed)]
    sized.sort(key=lambda pair: pair[0])
    smallest = {context.cfg.strategy: (size, context) for size, context in reversed(sized)}
    task = ray.remote(step_seconds).options(num_cpus=spec.cpus_per_worker, num_gpus=int(spec.use_gpu))
    threads = max(int(spec.cpus_per_worker), 1)
    seconds = {kind: ray.get(task.remote(context, threads)) for kind, (_, context) in smallest.items()}
    train, val = len(data.split.train), len(data.split.val)
    epoch_s = []
    for size, context in sized:
        strategy = context.cfg.strategy
        measured_size, measured = smallest[strategy]
        pair_s = seconds[strategy] / measured.cfg.batch_size * size / measured_size
        epoch_s.append(pair_s * (train + val / 3) + size * 12 / SAVED_BYTES_PER_S)
    trial_s = float(np.mean(epoch_s)) * spec.num_epochs
    more_pairs = (train + val + len(data.split.test) / 3) / (train + val / 3)
    hours = trial_s * trials / concurrent / 3600
    steps = ", ".join(f"{kind} of {smallest[kind][0]:,} parameters {1e3 * s:.0f} ms" for kind, s in seconds.items())
    return Estimate(
        trials=trials,
        concurrent=concurrent,
        hours=hours,
        hours_expected=hours * kept_share(spec),
        gpu_hours=trial_s * trials / 3600 * spec.num_workers if spec.use_gpu else 0.0,
        final_hours=trial_s * more_pairs * spec.num_final_seeds / 3600,
        measured=f"a step took, measured here: {steps}; the rest is in proportion",
    )


def kept_share(spec: SweepSpec) -> float:
    """Share of all epochs that are run if exactly one trial in `reduction_factor` passes each rung of `asha`."""
    if spec.scheduler != "asha":
        return 1.0
    epochs, running, epoch = 0.0, 1.0, 0.0
    rung = float(min(spec.grace_period, spec.num_epochs))
    while epoch < spec.num_epochs:
        end = min(rung, spec.num_epochs)
        epochs += running * (end - epoch)
        epoch, rung, running = end, rung * spec.reduction_factor, running / spec.reduction_factor
    return epochs / spec.num_epochs


def step_seconds(context: RunContext, threads: int) -> float:
    """Median seconds of a training step of this setting, on random pairs."""
    torch.set_num_threads(threads)
    cfg, store = context.cfg, context.store
    device = torch.device("cuda" if cfg.use_gpu else "cpu")
    adapter = build_adapter(context.adapter, 0)
    means = {"target_mean": torch.ones(store.feature("target").width)}
    objective = make_objective(context, adapter, means).to(device).train()
    optimizer = make_optimizer(objective, LEARNING_RATE, cfg.weight_decay)
    widths = store.feature("event").width, store.feature("target").width
    event_BE, target_BD = (torch.rand(cfg.batch_size, width, device=device) for width in widths)
    seconds = []
    for step in range(STEPS + 1):
        started = time.perf_counter()
        noise = BatchNoise(cfg.seed, step, 0, cfg.batch_size, cfg.batch_size)
        training_step(objective, optimizer, event_BE, target_BD, noise, global_pairs=cfg.batch_size)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:]))

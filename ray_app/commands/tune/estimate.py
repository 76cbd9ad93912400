"""Needs of a sweep, before its first trial: memory by arithmetic, time from one measured training step.

Shapes: B = pairs of a batch, E, D = widths of event and target.
"""

import sys
import time
from dataclasses import dataclass

import numpy as np
import ray
import torch

from ray_app.cluster.resources import ClusterInfo, require_resources
from ray_app.commands.train.context import RunContext, strategy_of
from ray_app.commands.train.plan import WEIGHTS_AND_MOMENTS_BYTES
from ray_app.commands.train.state import make_objective
from ray_app.commands.tune.context import SweepContext
from ray_app.commands.tune.progress import duration_words
from ray_app.commands.tune.space import describe, grid
from ray_app.config.train import DraftTrainConfig, LanguageModelTrainConfig
from ray_app.config.tune import TuneConfig
from ray_app.core.adapters.registry import build_adapter
from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.core.optimizer_step import decode, make_optimizer, training_step
from ray_app.errors import ConfigError, ResourceError
from ray_app.terminal import make_console

PROCESS_BYTES = 2**30
"""Memory of a trial's process without its model: Python, torch, Ray, the activations of a batch."""
STEPS = 3
"""Timed steps, after one that is not timed."""
LEARNING_RATE = 1e-6
"""Learning rate of the timed steps: too small for them to fail."""
SAVED_BYTES_PER_S = 3e8
"""Assumed speed of writing, hashing and syncing a checkpoint."""


def worker_bytes(run: RunContext) -> int:
    """Memory of a worker of this run: gradients, moments, the adapter's other tensors and the process itself.

    A language model's weights are counted twice: in bfloat16 on disk they are float32 in memory.
    """
    language_model = 0
    if isinstance(run.cfg, LanguageModelTrainConfig):
        language_model = 2 * sum(file.stat().st_size for file in run.cfg.language_model.glob("*.safetensors"))
    return run.parameters * WEIGHTS_AND_MOMENTS_BYTES + run.buffer_bytes + language_model + PROCESS_BYTES


def max_concurrent(sweep: SweepContext, info: ClusterInfo, shared_bytes: int = 0) -> int:
    """Trials at a time that the cluster has room for if each is the largest of the space.

    ResourceError, with the setting: not one fits. Each worker must fit on one node.
    """
    cfg, most = sweep.cfg, max(sweep.extreme, key=worker_bytes)
    require_resources(
        info,
        num_workers=cfg.num_workers,
        cpus_per_worker=cfg.cpus_per_worker,
        use_gpu=cfg.use_gpu,
        data_cpus=0.0,
        worker_bytes=1.0,
    )
    workers = info.max_workers_in_memory(cfg.cpus_per_worker, worker_bytes(most))
    if workers < cfg.num_workers:
        memory = info.node_memory_bytes or (info.memory_bytes,)
        buffers = f" and {most.buffer_bytes / 2**30:.1f} GiB of other tensors" if most.buffer_bytes else ""
        setting = describe({name: getattr(most.cfg, name) for name in sweep.space})
        raise ResourceError(
            f"the space cannot fit the memory: {setting} has {most.parameters:,} parameters{buffers}, which take "
            f"{worker_bytes(most) / 2**30:.1f} GiB in each of "
            f"{cfg.num_workers} workers, with {shared_bytes / 2**30:.1f} GiB of shared pairs; "
            f"the largest node has {max(memory) / 2**30:.1f} GiB for it. "
            "Take a smaller `hidden_dim` or `rank`, or another `strategy`."
        )
    fit = min([workers // cfg.num_workers, *([int(info.gpus // cfg.num_workers)] if cfg.use_gpu else [])])
    return min(fit, cfg.max_concurrent_trials) if cfg.max_concurrent_trials else fit


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


def estimate_sweep(sweep: SweepContext, concurrent: int) -> Estimate:
    """Estimate from a measured step of each strategy, of its fewest parameters, scaled by parameters and pairs.

    Most of a drafter's step is its language model's, whatever its own parameters are.
    Validation counts as a third of a step for each batch; the time of a checkpoint is assumed, not measured. The
    final training is taken to be of an average setting, with all epochs, on as many CPUs as a trial has.
    """
    cfg, split = sweep.cfg, next(iter(sweep.splits.values()))
    runs = sorted(sweep.typical or sweep.extreme, key=lambda run: run.parameters)
    smallest = {strategy_of(run.cfg): run for run in reversed(runs)}
    task = ray.remote(step_seconds).options(num_cpus=cfg.cpus_per_worker, num_gpus=int(cfg.use_gpu))
    seconds = {name: ray.get(task.remote(run, max(int(cfg.cpus_per_worker), 1))) for name, run in smallest.items()}
    train, val = len(split.train), len(split.val)
    epoch_s = []
    for run in runs:
        measured = smallest[strategy_of(run.cfg)]
        scale = 1.0 if cfg.drafting else max(run.parameters, 1) / max(measured.parameters, 1)
        pair_s = seconds[strategy_of(run.cfg)] / measured.cfg.batch_size * scale
        epoch_s.append(pair_s * (train + val / 3) + run.parameters * 12 / SAVED_BYTES_PER_S)
    trial_s = float(np.mean(epoch_s)) * cfg.num_epochs
    trials = min(len(grid(sweep.space)), cfg.max_trials) if cfg.search_alg == "grid" else cfg.max_trials
    hours = trial_s * trials / concurrent / 3600
    more_pairs = (train + val + len(split.test) / 3) / (train + val / 3)
    steps = ", ".join(
        f"{name} of {smallest[name].parameters:,} parameters {1e3 * s:.0f} ms" for name, s in seconds.items()
    )
    return Estimate(
        trials=trials,
        concurrent=concurrent,
        hours=hours,
        hours_expected=hours * kept_share(cfg),
        gpu_hours=trial_s * trials / 3600 * cfg.num_workers if cfg.use_gpu else 0.0,
        final_hours=trial_s * more_pairs * cfg.num_final_seeds / 3600,
        measured=f"a step took, measured here: {steps}; the rest is in proportion",
    )


def kept_share(cfg: TuneConfig) -> float:
    """Share of all epochs that are run if exactly one trial in `reduction_factor` passes each rung of `asha`."""
    if cfg.scheduler != "asha":
        return 1.0
    epochs, running, epoch = 0.0, 1.0, 0.0
    rung = float(min(cfg.grace_period, cfg.num_epochs))
    while epoch < cfg.num_epochs:
        end = min(rung, cfg.num_epochs)
        epochs += running * (end - epoch)
        epoch, rung, running = end, rung * cfg.reduction_factor, running / cfg.reduction_factor
    return epochs / cfg.num_epochs


def step_seconds(context: RunContext, threads: int) -> float:
    """Median seconds of a training step of this setting, on random pairs; of a drafter on true ones."""
    torch.set_num_threads(threads)
    cfg, store = context.cfg, context.store
    device = torch.device("cuda" if cfg.use_gpu else "cpu")
    adapter = build_adapter(context.adapter, 0)
    features = [store.feature(side) for side in ("event", "target")]
    means = {"target_mean": torch.ones(features[1].width)}
    objective = make_objective(context, adapter, means, device).train()
    optimizer = make_optimizer(objective, LEARNING_RATE, cfg.weight_decay)
    event_BE, target_BD = (torch.rand(cfg.batch_size, feature.width, device=device) for feature in features)
    if isinstance(cfg, DraftTrainConfig):  # its rows hold token ids
        sides = store.read_rows(np.resize(context.split.train, cfg.batch_size))
        event_BE, target_BD = (
            decode(torch.from_numpy(side), feature.scale, device)
            for side, feature in zip(sides, features, strict=True)
        )
    seconds = []
    for step in range(STEPS + 1):
        started = time.perf_counter()
        noise = BatchNoise(cfg.seed, step, 0, cfg.batch_size, cfg.batch_size)
        training_step(objective, optimizer, event_BE, target_BD, noise, global_pairs=cfg.batch_size)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:]))


def confirm_estimate(cfg: TuneConfig, estimate: Estimate) -> None:
    """Print the estimate; ask if it is above a limit. ConfigError: the answer is no, or there is no terminal."""
    expected, longest, last = (
        duration_words(3600 * hours) for hours in (estimate.hours_expected, estimate.hours, estimate.final_hours)
    )
    most = f" (at most {longest})" if estimate.hours_expected < estimate.hours else ""
    gpus = f", {estimate.gpu_hours:.2g} GPU hours at most" if estimate.gpu_hours else ""
    seeds = f"{cfg.num_final_seeds} seeds of the winner"
    final = f", then about {last} for {seeds}" if cfg.final else ""
    print(
        f"about {expected}{most}{gpus} for {estimate.trials} trials, {estimate.concurrent} at a "
        f"time{final}; {estimate.measured}",
        file=sys.stderr,
    )
    above = [
        f"{value:.2g} {unit} is above {name} {limit:g}"
        for value, unit, name, limit in (
            (estimate.hours_expected, "h", "max_hours", cfg.max_hours),
            (estimate.gpu_hours, "GPU hours", "max_gpu_hours", cfg.max_gpu_hours),
        )
        if limit and value > limit
    ]
    if not above or cfg.yes:
        return
    question = f"The estimate of {' and '.join(above)}: the search will end there, with trials unfinished."
    if not sys.stdin.isatty():
        raise ConfigError(f"{question} Add --yes to start in spite of it, or raise the limit.")
    answer = make_console(stderr=True).input(f"{question} Start? [y/N] ", markup=False)
    if answer.strip().lower() not in ("y", "yes"):
        raise ConfigError("nothing was started")

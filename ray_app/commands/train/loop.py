"""The one training loop; resuming from a checkpoint is the normal path.

It knows neither Ray Train nor Ray Tune: the worker, its pairs, its event log and the report are passed in.

Shapes: B = pairs of this worker's batch, E, D = widths of the event and the target feature.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ray_app.commands.train.all_pairs import gather_pairs
from ray_app.commands.train.context import RunContext
from ray_app.commands.train.parallelism import Membership
from ray_app.commands.train.state import Checkpointer, TrainState, broadcast_resume_point, resume_or_init
from ray_app.config.train import TrainConfig
from ray_app.core.adapters.base import InitStats
from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.core.adapters.slices import FeatureSlice
from ray_app.core.back_off import back_off_s
from ray_app.core.evaluation import Baselines
from ray_app.core.losses import AlignmentObjective
from ray_app.core.metrics import AlignmentCounts
from ray_app.core.optimizer_step import decode, training_step
from ray_app.data.batch_order import BatchSlice, ShardedBatchOrder
from ray_app.data.pair_tensors import PairTensors
from ray_app.errors import TrainingError
from ray_app.runs.event_log import EventLog, entries_since_start
from ray_app.runs.run_dir import RunDir
from ray_app.store.pair_store import PairStore

LONGEST_BACK_OFF_S = 30.0
"""Longest wait before another attempt."""

Batches = Iterator[tuple[BatchSlice, torch.Tensor, torch.Tensor]]
Report = Callable[[TrainState, dict[str, Any]], None]
"""Called after every epoch with the state and the validation metrics (empty without validation)."""


@dataclass(frozen=True, slots=True)
class WorkerData:
    """Pairs that a worker trains on and validates with."""

    rest_of_epoch: Callable[[TrainState], Batches]
    """Batches that are left of the epoch that a state is in."""
    resumable: bool
    """An epoch can be resumed in the middle."""
    validation: PairTensors | None
    """This worker's validation pairs; None where all pairs train."""
    baselines: "BaselineContext | None" = None
    """Baselines that every epoch is compared with; None where all pairs train."""


@dataclass(frozen=True, slots=True)
class BaselineContext:
    """Baselines that the adapter is compared with at every epoch."""

    baselines: Baselines
    """Baselines of all validation pairs."""
    all_pairs: PairTensors
    """Validation pairs with those of which `shuffled` takes the target, which may be another worker's."""


def train_epochs(
    worker: "WorkerContext",
    run: RunDir,
    data: WorkerData,
    log: EventLog | None,
    provenance: dict[str, Any],
    report: Report,
) -> None:
    """Train this worker's part of `run`, from its newest checkpoint. Only the first worker has an open `log`.

    Returns at the run's end, when a stop is requested, and after logging a failure that is the same on every worker
    and would come again after a restart.
    """
    cfg = worker.cfg
    resume_point = broadcast_resume_point(run, worker.rank, worker.world, worker.device)
    state = resume_or_init(worker.context, resume_point, worker.device, worker.init, worker.part)
    checkpointer = Checkpointer(run, worker.store, log, provenance)
    model = parallel(state.objective, worker)
    checkpointer.begin(state, worker.world)

    while not is_finished(state, cfg):
        try:
            batches = data.rest_of_epoch(state)
            if not train_epoch(model, state, batches, worker, checkpointer, data):
                return
            train, val = state.sums.means(), {}
            if data.validation:
                where = f"epoch {state.epoch + 1}, step {state.step}"
                val = validate(state.objective, data.validation, worker, where, data.baselines)
        except TrainingError as error:
            checkpointer.failed(error)
            return
        state.end_epoch(val.get("loss", train["loss"]), validated=bool(val))
        checkpointer.end_of_epoch(state, train, val)
        report(state, val)


def is_finished(state: TrainState, cfg: TrainConfig) -> bool:
    """Return True after the last epoch, or if the last few were no better than an earlier one."""
    return state.epoch >= cfg.num_epochs or state.waited >= cfg.early_stop_patience


def sleep_before_retry(run: RunDir) -> None:
    """Wait before another attempt of the same driver, twice as long after each that came no step further."""
    kinds = [line["kind"] for line in entries_since_start(run.path)]
    in_vain = kinds[::-1].index("step") if "step" in kinds else len(kinds)
    if attempts := kinds[len(kinds) - in_vain :].count("workers_started"):
        time.sleep(back_off_s(attempts, LONGEST_BACK_OFF_S))


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """One of the workers of a run."""

    context: RunContext
    """Settings, data and adapter of the run."""
    rank: int
    """Number of this worker."""
    world: int
    """Number of workers."""
    device: torch.device
    """Device that it computes on."""
    init: InitStats | None = None
    """Initial statistics, if they are in memory; otherwise they are read from the run."""
    member: Membership = field(default_factory=Membership)
    """Its slice of the features, and the workers with other pairs; by default all train whole features."""

    @property
    def cfg(self) -> TrainConfig:
        """The run's settings."""
        return self.context.cfg

    @property
    def store(self) -> PairStore:
        """The opened store."""
        return self.context.store

    @property
    def part(self) -> FeatureSlice:
        """Slice of the features that it trains; whole where workers divide the pairs."""
        return self.member.part

    @property
    def pair_rank(self) -> int:
        """Number of this worker among those that train different pairs."""
        return self.rank // self.part.count

    @property
    def pair_world(self) -> int:
        """Number of workers that train different pairs of a batch; 1 where all train slices of the same pairs."""
        return self.world // self.part.count

    @property
    def columns(self) -> tuple[slice, slice]:
        """Columns of event and target that it trains."""
        return self.context.columns(self.part)

    def decode_pair(self, event_BE: torch.Tensor, target_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode stored features to float32 on the device."""
        event, target = self.store.feature("event"), self.store.feature("target")
        return decode(event_BE, event.scale, self.device), decode(target_BD, target.scale, self.device)

    def all_reduce_sum(self, numbers: list[float]) -> list[float]:
        """Add numbers over all workers."""
        if self.world == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_over_pairs(self, numbers: list[float]) -> list[float]:
        """Add numbers of pairs over all workers; of those with slices of the same pairs the first one's count."""
        return self.all_reduce_sum(numbers if self.part.index == 0 else [0.0] * len(numbers))

    def count_over_pairs(self, cos: list[torch.Tensor]) -> AlignmentCounts:
        """Count the cosines of some batches over all workers, in the same way."""
        return all_reduce_counts(self, AlignmentCounts.of(torch.cat(cos if self.part.index == 0 else [cos[0][:0]])))


def parallel(objective: AlignmentObjective, worker: WorkerContext) -> torch.nn.Module:
    """Wrap the objective: of workers that divide pairs gradients are averaged, and contrasts see all pairs."""
    objective.train()
    if worker.pair_world > 1:
        objective.gather_pairs = partial(gather_pairs, worker.member.pair_group)
    if worker.pair_world == 1 or not any(parameter.requires_grad for parameter in objective.parameters()):
        return objective
    devices = [worker.device] if worker.device.type == "cuda" else None
    model = DistributedDataParallel(
        objective,
        device_ids=devices,
        process_group=worker.member.pair_group,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
    )
    if worker.cfg.bf16_gradients:
        model.register_comm_hook(None, bf16_all_reduce)
    return model


def bf16_all_reduce(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average gradients in bf16: half the bytes. torch's own hook needs NCCL; gloo adds bf16 as well."""
    gradient = bucket.buffer()
    narrow = (gradient / dist.get_world_size()).to(torch.bfloat16)
    return dist.all_reduce(narrow, async_op=True).get_future().then(lambda done: gradient.copy_(done.value()[0]))


def batches_in_memory(
    pairs: PairTensors, order: ShardedBatchOrder, state: TrainState, worker: WorkerContext
) -> Batches:
    """Yield the batches that are left of an epoch, from pairs in memory."""
    for batch in islice(order.epoch(state.epoch, worker.pair_rank, worker.pair_world), state.sums.batches, None):
        yield batch, *pairs.take(batch.positions)


def train_epoch(
    model: torch.nn.Module,
    state: TrainState,
    batches: Batches,
    worker: WorkerContext,
    checkpointer: Checkpointer,
    data: WorkerData,
) -> bool:
    """Train the rest of an epoch, into `state.sums`. False: a stop was requested, at the same step on every worker.

    A resumable epoch is saved then, and every `checkpoint_every` steps. Of one that is streamed nothing is saved: the
    run resumes at the end of the epoch before. Validation within the epoch does not count as training time.
    """
    cfg, sums = worker.cfg, state.sums
    state.objective.train()
    before_s = sums.seconds
    began = mark = time.perf_counter()
    for batch, event_BE, target_BD in batches:
        sums.data_wait_seconds += time.perf_counter() - mark
        if cfg.val_every_steps and state.step % cfg.val_every_steps == 0 and (sums.batches or not state.step):
            began += validate_within_epoch(state, data.validation, worker, checkpointer)
        result = training_step(
            model,
            state.optimizer,
            *worker.decode_pair(event_BE, target_BD),
            BatchNoise(cfg.seed, state.step, batch.first_row, len(batch.positions), batch.global_rows),
            global_pairs=batch.global_rows,
            world_size=worker.pair_world,
            grad_clip=cfg.grad_clip,
            precision=cfg.precision,
            where=f"epoch {state.epoch + 1}, step {state.step + 1}",
        )
        state.step += 1
        of_step = [result.pairs, result.loss_sum, result.cos_sum, float(checkpointer.stop_requested())]
        n, loss, cos, stop = worker.sum_over_pairs(of_step)
        sums.batches += 1
        sums.pairs, sums.loss, sums.cos_sim = sums.pairs + n, sums.loss + loss, sums.cos_sim + cos
        sums.seconds = before_s + time.perf_counter() - began
        checkpointer.step(state, loss / n, cos / n, result, worker.world)
        if data.resumable and (stop or (cfg.checkpoint_every and state.step % cfg.checkpoint_every == 0)):
            checkpointer.within_epoch(state)
        if stop:
            checkpointer.stopped(state)
            return False
        mark = time.perf_counter()
    return True


def validate_within_epoch(
    state: TrainState, pairs: PairTensors | None, worker: WorkerContext, checkpointer: Checkpointer
) -> float:
    """Validate before a step and log the metrics; return the seconds that this took."""
    if pairs is None:
        return 0.0
    began = time.perf_counter()
    val = validate(state.objective, pairs, worker, f"epoch {state.epoch + 1}, step {state.step}")
    state.objective.train()
    seconds = time.perf_counter() - began
    checkpointer.validation(state, val, seconds)
    return seconds


@torch.no_grad()
def validate(
    objective: AlignmentObjective,
    pairs: PairTensors,
    worker: WorkerContext,
    where: str,
    baselines: BaselineContext | None = None,
) -> dict[str, Any]:
    """Return loss and alignment metrics over the whole validation part; every pair counts once on some worker.

    Batches are those of one worker, divided: contrasts are with the same pairs for any number of workers. With
    `baselines` also their cosine_accept_rate at θ, and `lift` over the best of them; of drafters, or of what they are
    shown, tokens_per_target_pass. TrainingError, on every worker alike: the loss is not finite; `where` names the
    step in that message.
    """
    objective.eval()
    cos, shuffled, loss_sum = [], [], 0.0
    tokens = passes = 0.0
    total = int(worker.sum_over_pairs([len(pairs.positions)])[0])
    for batch in np.array_split(np.arange(total), -(-total // worker.cfg.batch_size) or 1):
        positions = np.intersect1d(batch, pairs.positions, assume_unique=True)
        event_BE, target_BD = worker.decode_pair(*pairs.take(positions))
        aligned_BD = objective.adapter(event_BE)
        losses = objective.losses(aligned_BD, target_BD)
        cos.append(losses["cos_sim"])
        loss_sum += float(losses["loss"].sum())
        if "passes" in losses:
            tokens, passes = tokens + float(losses["tokens"].sum()), passes + float(losses["passes"].sum())
        if baselines:
            _, other_BD = worker.decode_pair(*baselines.all_pairs.take(baselines.baselines.others[positions]))
            shuffled.append(objective.cosine(aligned_BD, other_BD))
    (loss_sum,) = worker.sum_over_pairs([loss_sum])
    if not math.isfinite(loss_sum):
        raise TrainingError(
            f"The validation loss is not finite ({loss_sum}) at {where}; try a smaller --learning-rate."
        )
    counts = worker.count_over_pairs(cos)
    lift = baselines.baselines.lift(counts, worker.count_over_pairs(shuffled)) if baselines else {}
    tokens, passes = worker.sum_over_pairs([tokens, passes])
    drafted = {"tokens_per_target_pass": tokens / passes} if passes else {}
    return {"loss": loss_sum / counts.pairs, **counts.means(), **lift, **drafted}


def all_reduce_counts(worker: WorkerContext, counts: AlignmentCounts) -> AlignmentCounts:
    """Add counts over all workers."""
    if worker.world > 1:
        sums, maxima = (vector.to(worker.device) for vector in counts.pack())
        dist.all_reduce(sums)
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
        counts = AlignmentCounts.unpack(sums, maxima)
    return counts

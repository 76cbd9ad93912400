"""The one training loop: one page, top to bottom; going on from a checkpoint is the normal path.

It knows neither Ray Train nor Ray Tune: who the worker is, its pairs, its event log and whom it reports to are
passed in.

Shapes: B = pairs at hand, E, D = widths of the event and the target feature.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ray_app.commands.train.state import Checkpointer, TrainState, broadcast_resume_point, resume_or_init
from ray_app.config.train import TrainConfig
from ray_app.core.adapters.base import InitStats
from ray_app.core.adapters.seeded_noise import BatchNoise
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
"""Before another attempt."""

Batches = Iterator[tuple[BatchSlice, torch.Tensor, torch.Tensor]]
Report = Callable[[TrainState, dict[str, Any]], None]
"""Hears of each epoch: the state after it, and what validation gave (nothing where nothing validates)."""


@dataclass(frozen=True, slots=True)
class WorkerData:
    """What a worker trains on, and judges by."""

    rest_of_epoch: Callable[[TrainState], Batches]
    """The batches of an epoch that are still to come."""
    resumable: bool
    """An epoch's order can be picked up in the middle."""
    validation: PairTensors | None
    """This worker's validation pairs; None where all pairs train."""
    beside: "BaselineContext | None" = None
    """Where lift is wanted at every epoch."""


@dataclass(frozen=True, slots=True)
class BaselineContext:
    """What the adapter is compared with at every epoch."""

    baselines: Baselines
    """Of all validation pairs."""
    broadcast: PairTensors
    """All validation pairs: `shuffled` takes the target of another one, which may be another worker's."""


def train_epochs(
    worker: "WorkerContext",
    run: RunDir,
    pairs: WorkerData,
    log: EventLog | None,
    provenance: dict[str, Any],
    report: Report,
) -> None:
    """A worker's part of `run`, from wherever it stands. `log` is open on the first worker, None on the others.

    It returns at the run's end, when asked to stop, and after a failure that it has told of: one that is the same on
    every worker, and again after a restart.
    """
    cfg = worker.cfg
    place = broadcast_resume_point(run, worker.rank, worker.world, worker.device)
    state = resume_or_init(cfg, worker.store, place, worker.device, worker.start)
    keeper = Checkpointer(run, worker.store, log, provenance) if log else None
    model = parallel(state.objective, cfg, worker)
    if keeper:
        keeper.begin(state, worker.world)

    while not is_finished(state, cfg):
        try:
            batches = pairs.rest_of_epoch(state)
            between = pairs.validation if cfg.val_every_steps else None
            if not train_epoch(model, state, batches, worker, keeper, resumable=pairs.resumable, between=between):
                return
            train, val = state.sums.means(), {}
            if pairs.validation:
                where = f"epoch {state.epoch + 1}, step {state.step}"
                val = validate(state.objective, pairs.validation, worker, where, pairs.beside)
        except TrainingError as error:
            if log:
                log.write("failed", error=str(error), time=time.time())
            return
        state.end_epoch(val.get("loss", train["loss"]), validated=bool(val))
        if keeper:
            keeper.end_of_epoch(state, train, val)
        report(state, val)


def is_finished(state: TrainState, cfg: TrainConfig) -> bool:
    """All epochs are done, or the last few were no better than an earlier one."""
    return state.epoch >= cfg.num_epochs or state.waited >= cfg.early_stop_patience


def sleep_before_retry(run: RunDir) -> None:
    """Waits before another attempt of the same driver, twice as long after each that came no step further."""
    kinds = [line["kind"] for line in entries_since_start(run.path)]
    in_vain = kinds[::-1].index("step") if "step" in kinds else len(kinds)
    if attempts := kinds[len(kinds) - in_vain :].count("workers_started"):
        time.sleep(min(2.0 ** (attempts - 1), LONGEST_BACK_OFF_S))


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """Who this is and what it works on."""

    cfg: TrainConfig
    """The run's settings."""
    store: PairStore
    """The opened store."""
    rank: int
    """Number of this worker."""
    world: int
    """Number of workers."""
    device: torch.device
    """Where it computes."""
    start: InitStats | None = None
    """What it begins with, where that is in memory; else it is read from RUN/init."""

    def decode_pair(self, event_BE: torch.Tensor, target_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stored features as float32 on the device."""
        event, target = self.store.feature("event"), self.store.feature("target")
        return decode(event_BE, event.scale, self.device), decode(target_BD, target.scale, self.device)

    def all_reduce_sum(self, numbers: list[float]) -> list[float]:
        """These numbers added over all workers."""
        if self.world == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()


def parallel(objective: AlignmentObjective, cfg: TrainConfig, worker: WorkerContext) -> torch.nn.Module:
    """The objective, its gradients averaged over workers where there are several."""
    objective.train()
    if worker.world == 1 or not any(parameter.requires_grad for parameter in objective.parameters()):
        return objective
    devices = [worker.device] if worker.device.type == "cuda" else None
    model = DistributedDataParallel(
        objective, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False
    )
    if cfg.bf16_gradients:
        model.register_comm_hook(None, bf16_all_reduce)
    return model


def bf16_all_reduce(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Gradients averaged in bf16: half the bytes. torch's own hook wants NCCL; gloo adds bf16 as well."""
    gradient = bucket.buffer()
    narrow = (gradient / dist.get_world_size()).to(torch.bfloat16)
    return dist.all_reduce(narrow, async_op=True).get_future().then(lambda done: gradient.copy_(done.value()[0]))


def held_batches(held: PairTensors, lanes: ShardedBatchOrder, state: TrainState, worker: WorkerContext) -> Batches:
    """The rest of an epoch's batches, out of memory."""
    for batch in islice(lanes.epoch(state.epoch, worker.rank, worker.world), state.sums.batches, None):
        yield batch, *held.take(batch.positions)


def train_epoch(
    model: torch.nn.Module,
    state: TrainState,
    batches: Batches,
    worker: WorkerContext,
    keeper: Checkpointer | None,
    *,
    resumable: bool,
    between: PairTensors | None = None,
) -> bool:
    """The rest of an epoch, into `state.sums`; saved in between where its order can be picked up there again.

    False: it was asked to stop; what was done is saved, and every worker returns at the same step. Of an epoch that
    is not resumable, being streamed, nothing is saved: the end of the one before is where the run goes on.
    `between`: this worker's validation pairs, where steps are judged within the epoch; that time is not training's.
    """
    cfg, sums = worker.cfg, state.sums
    state.objective.train()
    before_s = sums.seconds
    began = mark = time.perf_counter()
    for batch, event_BE, target_BD in batches:
        sums.data_wait_seconds += time.perf_counter() - mark
        if between and state.step % cfg.val_every_steps == 0 and (sums.batches or not state.step):
            began += validate_between(state, between, worker, keeper)
        done = training_step(
            model,
            state.optimizer,
            *worker.decode_pair(event_BE, target_BD),
            BatchNoise(cfg.seed, state.step, batch.first_row, len(batch.positions), batch.global_rows),
            global_pairs=batch.global_rows,
            world_size=worker.world,
            grad_clip=cfg.grad_clip,
            precision=cfg.precision,
            where=f"epoch {state.epoch + 1}, step {state.step + 1}",
        )
        state.step += 1
        asked = float(keeper is not None and keeper.run.stop_requested())
        n, loss, cos, stop = worker.all_reduce_sum([done.pairs, done.loss_sum, done.cos_sum, asked])
        sums.batches += 1
        sums.pairs, sums.loss, sums.cos_sim = sums.pairs + n, sums.loss + loss, sums.cos_sim + cos
        sums.seconds = before_s + time.perf_counter() - began
        if keeper:
            keeper.step(state, loss / n, cos / n, done, worker.world)
            if resumable and (stop or (cfg.checkpoint_every and state.step % cfg.checkpoint_every == 0)):
                keeper.within_epoch(state)
            if stop:
                keeper.log.write("stopped", global_step=state.step, time=time.time())
        if stop:
            return False
        mark = time.perf_counter()
    return True


def validate_between(
    state: TrainState, mine: PairTensors, worker: WorkerContext, keeper: Checkpointer | None
) -> float:
    """Validates before a step and tells of it; the seconds that this took."""
    began = time.perf_counter()
    val = validate(state.objective, mine, worker, f"epoch {state.epoch + 1}, step {state.step}")
    state.objective.train()
    seconds = time.perf_counter() - began
    if keeper:
        keeper.log.validation(state.step, val=val, seconds=seconds, trained_seconds=state.sums.seconds)
    return seconds


@torch.no_grad()
def validate(
    objective: AlignmentObjective,
    mine: PairTensors,
    worker: WorkerContext,
    where: str,
    beside: BaselineContext | None = None,
) -> dict[str, Any]:
    """Loss and alignment metrics over the whole validation part; every pair counts once on some worker.

    With `beside` also `baselines`, the cosine_accept_rate at θ of each, and `lift` over the best of them.
    TrainingError, on every worker alike, if the loss is not finite; `where` names the place in that message.
    """
    objective.eval()
    cos, shuffled, loss_sum = [], [], 0.0
    for positions in np.array_split(mine.positions, -(-len(mine.positions) // worker.cfg.batch_size) or 1):
        event_BE, target_BD = worker.decode_pair(*mine.take(positions))
        aligned_BD = objective.adapter(event_BE)
        losses = objective.losses(aligned_BD, target_BD)
        cos.append(losses["cos_sim"])
        loss_sum += float(losses["loss"].sum())
        if beside:
            _, other_BD = worker.decode_pair(*beside.broadcast.take(beside.baselines.others[positions]))
            shuffled.append(objective.cosine(aligned_BD, other_BD))
    (loss_sum,) = worker.all_reduce_sum([loss_sum])
    if not math.isfinite(loss_sum):
        raise TrainingError(
            f"The validation loss is not finite ({loss_sum}) at {where}; try a smaller --learning-rate."
        )
    counts = reduce_counts(worker, cos)
    lift = beside.baselines.lift(counts, reduce_counts(worker, shuffled)) if beside else {}
    return {"loss": loss_sum / counts.pairs, **counts.means(), **lift}


def reduce_counts(worker: WorkerContext, cosines: list[torch.Tensor]) -> AlignmentCounts:
    """Counts over all workers."""
    counts = AlignmentCounts.of(torch.cat(cosines))
    if worker.world > 1:
        sums, maxima = (vector.to(worker.device) for vector in counts.pack())
        dist.all_reduce(sums)
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
        counts = AlignmentCounts.unpack(sums, maxima)
    return counts

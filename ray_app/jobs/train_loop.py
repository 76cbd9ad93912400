"""What each Ray Train worker does: one page, top to bottom; going on from a checkpoint is the normal path.

Shapes: B = pairs at hand, E, D = widths of the event and the target feature.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ray_app.config import TrainConfig
from ray_app.core.adapter import AdapterConfig, build_adapter
from ray_app.core.losses import AlignmentObjective, LossWeights
from ray_app.core.metrics import AlignmentCounts
from ray_app.core.noise import BatchNoise
from ray_app.core.step import decode, make_optimizer, training_step
from ray_app.errors import TrainingError
from ray_app.jobs.journal import Journal, entries
from ray_app.jobs.lanes import Batch, Lanes
from ray_app.jobs.run_folder import RunFolder
from ray_app.jobs.shards import Held, hold, stream
from ray_app.store.checkpoint import load_checkpoint, load_training_state
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """One worker's run. `config`: `train` (a TrainConfig), `held`, `threads`, `provenance`."""
    cfg = TrainConfig.model_validate(config["train"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config["threads"])
    run, store = RunFolder(cfg.out), PairStore.open(cfg.store, cfg.durations)
    split = split_pairs(store.index, cfg.split_config)
    worker = Worker(cfg, store, rank, world, get_device())
    state = resume_or_init(cfg, store, run, worker.device)
    model = parallel(state.objective, cfg, worker)
    lanes = Lanes(len(split.train), cfg.batch_size, cfg.seed)
    shard = ray.train.get_dataset_shard("train")
    held = hold(shard, store, split.train, lanes.held(rank, world)) if config["held"] else None
    mine = np.arange(rank, len(split.val), world)
    validation = hold(ray.train.get_dataset_shard("val"), store, split.val, mine)

    with Journal(run.path) if rank == 0 else nullcontext() as journal:
        if journal and state.epoch:
            resumed(journal, run, state)
        for epoch in range(state.epoch, cfg.num_epochs):
            if state.waited >= cfg.early_stop_patience:
                break
            batches = (
                held_batches(held, lanes, epoch, worker)
                if held
                else stream(shard, store, cfg.seed, epoch, rank, world, cfg.batch_size)
            )
            try:
                train = train_epoch(model, state, batches, worker, epoch, journal)
                val = validate(state.objective, validation, worker, f"epoch {epoch + 1}, step {state.step}")
            except TrainingError as error:  # the same on every worker, and again after a restart: so no retry
                if journal:
                    journal.write("failure", error=str(error), time=time.time())
                return
            state.end_epoch(val["loss"])
            metrics = {"epoch": state.epoch, "train": train, "val": val}
            if journal:
                began = time.perf_counter()
                run.save(
                    state.epoch,
                    state.objective.adapter,
                    features=store.manifest.features,
                    metrics=metrics,
                    provenance=config["provenance"],
                    tensors=state.tensors(),
                    meta=state.meta(),
                    best_epoch=state.best_epoch,
                )
                tell_epoch(journal, metrics, state, time.perf_counter() - began)
            ray.train.report({"epoch": state.epoch, "val_loss": val["loss"]})


@dataclass(frozen=True, slots=True)
class Worker:
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

    def decoded(self, event_BE: torch.Tensor, target_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stored features as float32 on the device."""
        event, target = self.store.feature("event"), self.store.feature("target")
        return decode(event_BE, event.scale, self.device), decode(target_BD, target.scale, self.device)

    def summed(self, numbers: list[float]) -> list[float]:
        """These numbers added over all workers."""
        if self.world == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()


@dataclass(slots=True)
class TrainState:
    """Everything that changes, and so everything that resuming needs."""

    objective: AlignmentObjective
    """Adapter and losses."""
    optimizer: AdamW
    """With its moments."""
    scheduler: ReduceLROnPlateau
    """Halves the learning rate."""
    epoch: int = 0
    """Finished epochs."""
    step: int = 0
    """Finished optimizer steps."""
    best_loss: float = float("inf")
    """Best validation loss."""
    best_epoch: int = 0
    """Finished epochs when it was reached."""
    waited: int = 0
    """Epochs since then."""
    counters: tuple[str, ...] = field(default=("epoch", "step", "best_loss", "best_epoch", "waited"), repr=False)
    """Fields that are saved as they are."""

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def end_epoch(self, val_loss: float) -> None:
        """Takes note of an epoch's validation loss."""
        self.epoch += 1
        self.waited += 1
        if val_loss < self.best_loss:
            self.best_loss, self.best_epoch, self.waited = val_loss, self.epoch, 0
        self.scheduler.step(val_loss)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Optimizer moments by parameter, and what is trained beside the adapter."""
        tensors = {
            f"optimizer.{index}.{name}": value.cpu()
            for index, values in self.optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        if self.objective.log_temperature is not None:
            tensors["log_temperature"] = self.objective.log_temperature.detach().cpu()
        return tensors

    def meta(self) -> dict[str, Any]:
        """Counters and schedule as JSON values."""
        schedule = self.scheduler.state_dict()
        return {
            "counters": {name: getattr(self, name) for name in self.counters},
            "learning_rate": self.learning_rate,
            "scheduler": {key: schedule[key] for key in ("best", "num_bad_epochs", "last_epoch")},
        }

    def load(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        """The inverse of `tensors` and `meta`."""
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                moments.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        for group in self.optimizer.param_groups:
            group["lr"] = meta["learning_rate"]
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), **meta["scheduler"]})
        if self.objective.log_temperature is not None:
            self.objective.log_temperature.data.copy_(tensors["log_temperature"])
        for name in self.counters:
            setattr(self, name, meta["counters"][name])


def resume_or_init(cfg: TrainConfig, store: PairStore, run: RunFolder, device: torch.device) -> TrainState:
    """The newest verified state of this run, or its beginning."""
    folder = run.newest_state()
    if folder is None:
        adapter = build_adapter(adapter_config(cfg, store), cfg.seed)
    else:
        adapter = load_checkpoint(run.path / "checkpoints" / folder.name).adapter
    weights = LossWeights(cfg.mse_weight, cfg.cosine_weight, cfg.contrastive_weight, cfg.mse_space)
    objective = AlignmentObjective(adapter, weights).to(device)
    optimizer = make_optimizer(objective, cfg.learning_rate, cfg.weight_decay)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=cfg.plateau_patience)
    state = TrainState(objective, optimizer, scheduler)
    if folder is not None:
        state.load(*load_training_state(folder))
    return state


def resumed(journal: Journal, run: RunFolder, state: TrainState) -> None:
    """Notes the restart, and does what a worker that died right after a save could not do any more."""
    journal.write("resume", epoch=state.epoch, global_step=state.step, time=time.time())
    run.settle(state.epoch, state.best_epoch)
    if not any(line["kind"] == "epoch" and line["epoch"] == state.epoch for line in entries(run.path)):
        metrics = json.loads((run.checkpoint(state.epoch) / "metrics.json").read_text())
        tell_epoch(journal, metrics, state, 0.0)


def tell_epoch(journal: Journal, metrics: dict[str, Any], state: TrainState, save_seconds: float) -> None:
    """One `epoch` line."""
    about = {"save_seconds": save_seconds, "learning_rate": state.learning_rate, "global_step": state.step}
    journal.write("epoch", **metrics, **about, time=time.time())


def adapter_config(cfg: TrainConfig, store: PairStore) -> AdapterConfig:
    """The adapter that fits a store."""
    widths = store.feature("event").width, store.feature("target").width
    return AdapterConfig(cfg.strategy, *widths, cfg.hidden_dim, cfg.dropout)


def parallel(objective: AlignmentObjective, cfg: TrainConfig, worker: Worker) -> torch.nn.Module:
    """The objective, its gradients averaged over workers where there are several."""
    objective.train()
    if worker.world == 1:
        return objective
    devices = [worker.device] if worker.device.type == "cuda" else None
    model = DistributedDataParallel(objective, device_ids=devices, gradient_as_bucket_view=True)
    if cfg.bf16_gradients:
        model.register_comm_hook(None, bf16_all_reduce)
    return model


def bf16_all_reduce(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Gradients averaged in bf16: half the bytes. torch's own hook wants NCCL; gloo adds bf16 as well."""
    gradient = bucket.buffer()
    narrow = (gradient / dist.get_world_size()).to(torch.bfloat16)
    return dist.all_reduce(narrow, async_op=True).get_future().then(lambda done: gradient.copy_(done.value()[0]))


Batches = Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]


def held_batches(held: Held, lanes: Lanes, epoch: int, worker: Worker) -> Batches:
    """One epoch's batches out of memory."""
    for batch in lanes.epoch(epoch, worker.rank, worker.world):
        yield batch, *held.take(batch.positions)


def train_epoch(
    model: torch.nn.Module, state: TrainState, batches: Batches, worker: Worker, epoch: int, journal: Journal | None
) -> dict[str, float]:
    """One pass; the means over all workers' pairs, the seconds, and how many of them went by waiting for data."""
    cfg = worker.cfg
    state.objective.train()
    pairs = loss_sum = cos_sum = waited_s = 0.0
    began = mark = time.perf_counter()
    for batch, event_BE, target_BD in batches:
        waited_s += time.perf_counter() - mark
        done = training_step(
            model,
            state.optimizer,
            *worker.decoded(event_BE, target_BD),
            BatchNoise(cfg.seed, state.step, batch.first_row, len(batch.positions), batch.global_rows),
            global_pairs=batch.global_rows,
            world_size=worker.world,
            grad_clip=cfg.grad_clip,
            precision=cfg.precision,
            where=f"epoch {epoch + 1}, step {state.step + 1}",
        )
        state.step += 1
        n, loss, cos = worker.summed([done.pairs, done.loss_sum, done.cos_sum])
        pairs, loss_sum, cos_sum = pairs + n, loss_sum + loss, cos_sum + cos
        if journal:
            means = {"loss": loss / n, "cos_sim": cos / n, "grad_norm": done.grad_norm}
            so_far = {"epoch": epoch + 1, "pairs": pairs, "seconds": time.perf_counter() - began}
            journal.write("step", **means, **so_far, global_step=state.step, time=time.time())
        mark = time.perf_counter()
    return {
        "loss": loss_sum / pairs,
        "cos_sim": cos_sum / pairs,
        "pairs": pairs,
        "seconds": time.perf_counter() - began,
        "data_wait_seconds": waited_s,
    }


@torch.no_grad()
def validate(objective: AlignmentObjective, mine: Held, worker: Worker, where: str) -> dict[str, Any]:
    """Loss and alignment metrics over the whole validation part; every pair counts once on some worker.

    TrainingError, on every worker alike, if the loss is not finite; `where` names the place in that message.
    """
    objective.eval()
    cos, loss_sum = [], 0.0
    for positions in np.array_split(mine.positions, -(-len(mine.positions) // worker.cfg.batch_size) or 1):
        losses = objective(*worker.decoded(*mine.take(positions)))
        cos.append(losses["cos_sim"])
        loss_sum += float(losses["loss"].sum())
    (loss_sum,) = worker.summed([loss_sum])
    if not math.isfinite(loss_sum):
        raise TrainingError(
            f"The validation loss is not finite ({loss_sum}) at {where}; try a smaller --learning-rate."
        )
    counts = AlignmentCounts.of(torch.cat(cos))
    if worker.world > 1:
        sums, maxima = (vector.to(worker.device) for vector in counts.pack())
        dist.all_reduce(sums)
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
        counts = AlignmentCounts.unpack(sums, maxima)
    return {"loss": loss_sum / counts.pairs, **counts.means()}

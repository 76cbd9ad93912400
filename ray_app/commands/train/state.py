"""The state of training: what it is, how it is saved, and where a run resumes."""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ray_app.commands.train.context import RunContext
from ray_app.commands.train.initialization import first_directions, load_init
from ray_app.config.train import AnswerTrainConfig, DraftTrainConfig, LanguageModelTrainConfig, TrainConfig
from ray_app.core.adapters.base import Adapter, InitStats
from ray_app.core.adapters.drafting import EagleHead
from ray_app.core.adapters.image_tokens import ImageTokens
from ray_app.core.adapters.registry import build_adapter
from ray_app.core.adapters.slices import WHOLE, FeatureSlice, TensorSlice, gather
from ray_app.core.losses import AlignmentObjective, LossWeights
from ray_app.core.optimizer_step import CosineByEpoch, StepResult, make_optimizer
from ray_app.core.sliced_losses import SlicedObjective
from ray_app.errors import TrainingError
from ray_app.language_models.answer_objective import AnswerObjective
from ray_app.language_models.draft_objective import draft_objective
from ray_app.language_models.draft_rows import layout_of
from ray_app.language_models.eagle.objective import eagle_objective
from ray_app.parsing.json_text import parse_object
from ray_app.runs.event_log import EventLog
from ray_app.runs.run_dir import CHECKPOINTS, STATES, RunDir, checkpoint_name
from ray_app.store.checkpoint import (
    StreamedTensor,
    Tensors,
    load_checkpoint,
    load_training_state,
    read_tensors,
)
from ray_app.store.pair_store import PairStore

COUNTERS = ("epoch", "step", "best_loss", "best_epoch", "waited")
"""Fields of `TrainState` that are saved as they are."""


@dataclass(slots=True)
class EpochTotals:
    """Totals of one epoch over all workers; part of the state, since a run may resume within an epoch."""

    batches: int = 0
    """Number of global batches done: the position in the epoch's order."""
    pairs: float = 0.0
    """Number of pairs in these batches."""
    loss: float = 0.0
    """Sum of the pairs' losses."""
    cos_sim: float = 0.0
    """Sum of the pairs' cosines."""
    seconds: float = 0.0
    """Seconds of training."""
    data_wait_seconds: float = 0.0
    """Seconds of waiting for data, part of `seconds`."""

    def means(self) -> dict[str, float]:
        """Means, and sums of time, for the event log."""
        return {
            "loss": self.loss / self.pairs,
            "cos_sim": self.cos_sim / self.pairs,
            "pairs": self.pairs,
            "seconds": self.seconds,
            "data_wait_seconds": self.data_wait_seconds,
        }


@dataclass(slots=True)
class TrainState:
    """Everything that training changes."""

    objective: AlignmentObjective
    """Adapter and losses."""
    optimizer: AdamW
    """AdamW with its moments."""
    scheduler: ReduceLROnPlateau | CosineByEpoch
    """Schedule of the learning rate."""
    epoch: int = 0
    """Number of finished epochs."""
    step: int = 0
    """Number of finished optimizer steps."""
    best_loss: float = float("inf")
    """Best validation loss."""
    best_epoch: int = 0
    """Number of finished epochs when it was reached."""
    waited: int = 0
    """Number of epochs since then."""
    sums: EpochTotals = field(default_factory=EpochTotals)
    """Totals of the current epoch."""

    @property
    def checkpoint_name(self) -> str:
        """Name of this state's checkpoint."""
        return checkpoint_name(self.epoch, self.step if self.sums.batches else None)

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def end_epoch(self, loss: float, *, validated: bool = True) -> None:
        """Finish an epoch with its validation loss.

        Without validation `loss` is the training loss: it steers the learning rate alone, and the newest epoch counts
        as the best.
        """
        self.epoch += 1
        self.sums = EpochTotals()
        self.waited += 1
        if loss < self.best_loss or not validated:
            self.best_loss, self.best_epoch, self.waited = loss, self.epoch, 0
        self.scheduler.step(loss)

    def tensors(self) -> Tensors:
        """Optimizer moments by parameter, and trained numbers outside the adapter; whole, or streamed if divided."""
        tensors = {
            f"optimizer.{index}.{name}": value
            for index, values in self.optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        if self.objective.log_temperature is not None:
            tensors["log_temperature"] = self.objective.log_temperature.detach()
        if self.is_divided:
            return self._streamed(tensors, self.moment_slices())
        return {name: value.cpu() for name, value in tensors.items()}

    def weights(self) -> dict[str, StreamedTensor] | None:
        """Weights of the whole adapter where this worker holds a part of them; None where it holds all."""
        adapter = self.objective.adapter
        return self._streamed(adapter.state_dict(), adapter.slices()) if self.is_divided else None

    @property
    def is_divided(self) -> bool:
        """True if this worker holds a part of the weights."""
        return self.objective.adapter.part.count > 1

    def give_parts(self) -> None:
        """Take part in a save by the first worker: it gathers `tensors`, then `weights`, in their order."""
        for tensors in (self.tensors(), self.weights() or {}) if self.is_divided else ():
            for tensor in tensors.values():
                assert isinstance(tensor, StreamedTensor)
                deque(tensor.blocks, maxlen=0)

    def moment_slices(self) -> dict[str, TensorSlice]:
        """Tensors of `tensors` of which this worker holds a part, by name."""
        slices = self.objective.adapter.slices()
        names = (name.removeprefix("adapter.") for name, _ in self.objective.named_parameters())
        return {
            f"optimizer.{index}.{moment}": slices[name]
            for index, name in enumerate(names)
            for moment in ("exp_avg", "exp_avg_sq")
            if name in slices
        }

    def _streamed(
        self, tensors: Mapping[str, torch.Tensor], slices: Mapping[str, TensorSlice]
    ) -> dict[str, StreamedTensor]:
        """Gather the tensors that are divided when their turn comes; the others are the same on each worker."""
        part = self.objective.adapter.part
        return {
            name: StreamedTensor(slices[name].shape, gather(tensor, slices[name], part))
            if name in slices
            else StreamedTensor(tuple(tensor.shape), iter([tensor]))
            for name, tensor in sorted(tensors.items())  # a resumed optimizer has them in another order
        }

    def meta(self) -> dict[str, Any]:
        """Counters, position and schedule, as JSON values."""
        schedule = self.scheduler.state_dict()
        return {
            "counters": {name: getattr(self, name) for name in COUNTERS},
            "sums": asdict(self.sums),
            "learning_rate": self.learning_rate,
            "scheduler": {key: schedule[key] for key in ("best", "num_bad_epochs", "last_epoch") if key in schedule},
        }

    def load(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        """Restore what `tensors` and `meta` returned."""
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
        for name in COUNTERS:
            setattr(self, name, meta["counters"][name])
        self.sums = EpochTotals(**meta["sums"])


def make_objective(
    context: RunContext, adapter: Adapter, init: InitStats, device: torch.device
) -> AlignmentObjective:
    """Join the adapter with the losses and the augmentation of a run, on a device."""
    cfg = context.cfg
    if isinstance(cfg, AnswerTrainConfig):
        assert isinstance(adapter, ImageTokens)
        return AnswerObjective(adapter, cfg.language_model, device)
    if isinstance(cfg, DraftTrainConfig):
        if isinstance(adapter, EagleHead):
            return eagle_objective(cfg, adapter, layout_of(context.store.manifest.source, cfg.store), device)
        return draft_objective(cfg, adapter, layout_of(context.store.manifest.source, cfg.store), device)
    weights = LossWeights(
        mse=cfg.mse_weight,
        cosine=cfg.cosine_weight,
        contrastive=cfg.contrastive_weight,
        mse_space=cfg.mse_space,
        accept=cfg.accept_weight,
        accept_thetas=cfg.accept_thetas,
        accept_temperature=cfg.accept_temperature,
        centred=cfg.centred_weight,
        next_position=cfg.next_position_weight,
    )
    mean_target = init["target_mean"] if cfg.centred_weight else None
    if adapter.part.count > 1:
        _, columns = adapter.columns(adapter.config, adapter.part)
        own_mean = None if mean_target is None else mean_target[columns].clone()
        return SlicedObjective(adapter, weights, own_mean).to(device)
    return AlignmentObjective(adapter, weights, context.augmentation, mean_target).to(device)


def resume_or_init(
    context: RunContext,
    checkpoint: str | None,
    device: torch.device,
    known: InitStats | None = None,
    part: FeatureSlice = WHOLE,
) -> TrainState:
    """Restore the state at a checkpoint, or make the first one (None). CheckpointError: a file is damaged.

    `known`: the initial statistics, if they are in memory already. `part`: slice of the features that this worker
    trains; checkpoints are whole, whatever wrote them.
    """
    cfg, run = context.cfg, RunDir(context.cfg.folder)
    needed = context.requires != "nothing" and (checkpoint is None or cfg.centred_weight > 0)
    init = (known or load_init(context)) if needed else {}
    if checkpoint is None:
        adapter = build_adapter(context.adapter, cfg.seed, part)
        if init:
            adapter.initialize_from(init, pca=cfg.init == "pca")
        if isinstance(cfg, LanguageModelTrainConfig):
            adapter.load_state_dict(first_directions(read_tensors(cfg.projector_start), cfg.rank), strict=False)
    else:
        adapter = load_checkpoint(run.checkpoint(checkpoint), part).adapter
    objective = make_objective(context, adapter, init, device)
    optimizer = make_optimizer(objective, cfg.learning_rate, cfg.weight_decay)
    state = TrainState(objective, optimizer, make_schedule(cfg, optimizer))
    if checkpoint is not None:
        state.load(*load_training_state(run.state(checkpoint), state.moment_slices()))
    return state


def make_schedule(cfg: TrainConfig, optimizer: AdamW) -> ReduceLROnPlateau | CosineByEpoch:
    """Make the schedule of the learning rate."""
    if cfg.schedule == "cosine":
        return CosineByEpoch(optimizer, cfg.learning_rate, cfg.num_epochs)
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=cfg.plateau_patience)


def broadcast_resume_point(run: RunDir, rank: int, world: int, device: torch.device) -> str | None:
    """Return the newest checkpoint that verifies, or None: the first worker finds it and broadcasts it."""
    name = run.latest_resumable() if rank == 0 else None
    if world == 1:
        return name
    code = torch.tensor([int(part) for part in (name or "").split("_")[1::2]] + [-1, -1], device=device)[:2].clone()
    dist.broadcast(code, 0)
    epoch, step = code.tolist()
    if epoch < 0:
        return None
    name = checkpoint_name(epoch, None if step < 0 else step)
    run.download(f"{CHECKPOINTS}/{name}", f"{STATES}/{name}")
    return name


@dataclass(frozen=True, slots=True)
class Checkpointer:
    """Saves checkpoints and writes the event log, on the first worker; another gives its part of what is saved."""

    run: RunDir
    """The run's folder."""
    store: PairStore
    """The opened store."""
    log: EventLog | None
    """The open event log; None on all workers but the first."""
    provenance: dict[str, Any]
    """Written into each checkpoint."""

    def begin(self, state: TrainState, workers: int) -> None:
        """Log that the run resumes, and finish what a worker that died right after a save left undone."""
        if not state.step or not self.log:
            return
        self.log.write("resumed", epoch=state.epoch, global_step=state.step, workers=workers, time=time.time())
        self.run.prune_checkpoints(state.checkpoint_name, state.best_epoch)
        if state.best_epoch and not state.sums.batches:  # none: the checkpoint is another run's, which has logged it
            metrics = parse_object((self.run.checkpoint(state.checkpoint_name) / "metrics.json").read_bytes())
            self._log_epoch(state, metrics, 0.0)

    def step(self, state: TrainState, loss: float, cos_sim: float, done: StepResult, workers: int) -> None:
        """Log one optimizer step, with means over all workers."""
        if not self.log:
            return
        means = {"loss": loss, "cos_sim": cos_sim, "grad_norm": done.grad_norm}
        so_far = {"epoch": state.epoch + 1, "pairs": state.sums.pairs, "seconds": state.sums.seconds}
        self.log.step(state.step, workers=workers, **means, **so_far)

    def validation(self, state: TrainState, val: dict[str, Any], seconds: float) -> None:
        """Log a validation within an epoch, which took so many seconds."""
        if self.log:
            self.log.validation(state.step, val=val, seconds=seconds, trained_seconds=state.sums.seconds)

    def stop_requested(self) -> bool:
        """True on the first worker if a stop was requested."""
        return self.log is not None and self.run.stop_requested()

    def stopped(self, state: TrainState) -> None:
        """Log that the run stops as requested."""
        if self.log:
            self.log.write("stopped", global_step=state.step, time=time.time())

    def failed(self, error: TrainingError) -> None:
        """Log a failure that is the same on every worker."""
        if self.log:
            self.log.write("failed", error=str(error), time=time.time())

    def within_epoch(self, state: TrainState) -> Path:
        """Save within an epoch; return the checkpoint's folder."""
        self._save(state, {"epoch": state.epoch, "step": state.step, "train": state.sums.means()})
        return self.run.checkpoint(state.checkpoint_name)

    def end_of_epoch(self, state: TrainState, train: dict[str, Any], val: dict[str, Any]) -> None:
        """Save and log an epoch that `state` has finished."""
        metrics = {"epoch": state.epoch, "train": train, "val": val}
        self._log_epoch(state, metrics, self._save(state, metrics))

    def _save(self, state: TrainState, metrics: dict[str, Any]) -> float:
        if not self.log:
            state.give_parts()
            return 0.0
        began = time.perf_counter()
        self.run.save(
            state.checkpoint_name,
            state.objective.adapter,
            features=self.store.manifest.features,
            metrics=metrics,
            provenance=self.provenance,
            tensors=state.tensors(),
            meta=state.meta(),
            best_epoch=state.best_epoch,
            weights=state.weights(),
        )
        return time.perf_counter() - began

    def _log_epoch(self, state: TrainState, metrics: dict[str, Any], save_seconds: float) -> None:
        if not self.log:
            return
        self.log.epoch(
            **metrics, save_seconds=save_seconds, learning_rate=state.learning_rate, global_step=state.step
        )

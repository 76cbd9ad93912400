"""What changes in training, and so all that going on needs: what it is, how it is saved, where it is found again."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ray_app.commands.train.initialization import init_requirement, load_start
from ray_app.config.train import TrainConfig
from ray_app.core.adapters.base import Adapter, InitStats
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import STRATEGIES, build_adapter, num_parameters
from ray_app.core.adapters.token import TokenAdapter
from ray_app.core.augmentation import Augmentation
from ray_app.core.losses import AlignmentObjective, LossWeights
from ray_app.core.optimizer_step import CosineByEpoch, StepResult, make_optimizer
from ray_app.errors import ConfigError
from ray_app.runs.event_log import EventLog
from ray_app.runs.run_dir import CHECKPOINTS, STATES, RunDir, checkpoint_name
from ray_app.store.checkpoint import load_checkpoint, load_training_state
from ray_app.store.pair_store import PairStore
from ray_app.store.split import Split, split_pairs


@dataclass(slots=True)
class EpochTotals:
    """One epoch so far, over all workers; part of the state, since a run may go on in the middle of an epoch."""

    batches: int = 0
    """Global batches done: the position in the epoch's order."""
    pairs: float = 0.0
    """Pairs in them."""
    loss: float = 0.0
    """Sum of their losses."""
    cos_sim: float = 0.0
    """Sum of their cosines."""
    seconds: float = 0.0
    """Time they took."""
    data_wait_seconds: float = 0.0
    """Of it, waiting for data."""

    def means(self) -> dict[str, float]:
        """For the event log: means, and sums of time."""
        return {
            "loss": self.loss / self.pairs,
            "cos_sim": self.cos_sim / self.pairs,
            "pairs": self.pairs,
            "seconds": self.seconds,
            "data_wait_seconds": self.data_wait_seconds,
        }


@dataclass(slots=True)
class TrainState:
    """Everything that changes."""

    objective: AlignmentObjective
    """Adapter and losses."""
    optimizer: AdamW
    """With its moments."""
    scheduler: ReduceLROnPlateau | CosineByEpoch
    """Lowers the learning rate."""
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
    sums: EpochTotals = field(default_factory=EpochTotals)
    """The epoch that goes on."""
    counters: tuple[str, ...] = field(default=("epoch", "step", "best_loss", "best_epoch", "waited"), repr=False)
    """Fields that are saved as they are."""

    @property
    def checkpoint_name(self) -> str:
        """Where this is in the run."""
        return checkpoint_name(self.epoch, self.step if self.sums.batches else None)

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def end_epoch(self, loss: float, *, validated: bool = True) -> None:
        """Takes note of an epoch's validation loss; the next begins.

        Where nothing validates it is the training loss: it steers the learning rate alone, and the newest epoch is
        the best there is.
        """
        self.epoch += 1
        self.sums = EpochTotals()
        self.waited += 1
        if loss < self.best_loss or not validated:
            self.best_loss, self.best_epoch, self.waited = loss, self.epoch, 0
        self.scheduler.step(loss)

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
        """Counters, position and schedule as JSON values."""
        schedule = self.scheduler.state_dict()
        return {
            "counters": {name: getattr(self, name) for name in self.counters},
            "sums": asdict(self.sums),
            "learning_rate": self.learning_rate,
            "scheduler": {key: schedule[key] for key in ("best", "num_bad_epochs", "last_epoch") if key in schedule},
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
        self.sums = EpochTotals(**meta["sums"])


def training_split(cfg: TrainConfig, store: PairStore) -> Split:
    """The split of a run: its validation part is empty where that trains too."""
    split = split_pairs(store.index, cfg.split_config)
    return split.without_validation() if cfg.train_on_val else split


def adapter_config(cfg: TrainConfig, store: PairStore) -> AdapterConfig:
    """The adapter that fits a store. ConfigError where the two, or the losses and the store, do not go together."""
    sequences = store.feature("target").token_width is not None
    if cfg.next_position_weight and not sequences:
        raise ConfigError("--next-position-weight is for sequences (tokens, width); leave it out")
    if sequences and (cfg.centred_weight or cfg.contrastive_weight):
        raise ConfigError(
            "--centred-weight and --contrastive-weight compare whole features, and sequences differ in length; leave "
            "them out"
        )
    event, target = store.feature("event"), store.feature("target")
    strategy = STRATEGIES[cfg.strategy]
    if sequences and not issubclass(strategy, TokenAdapter):
        raise ConfigError(
            f"{cfg.strategy} takes whole features, and these are sequences of different lengths, whose mask "
            "the token adapters alone keep; use one of: "
            + ", ".join(name for name, each in STRATEGIES.items() if issubclass(each, TokenAdapter))
        )
    return AdapterConfig(
        cfg.strategy,
        event.width,
        target.width,
        cfg.hidden_dim or strategy.HIDDEN_DIM,
        cfg.dropout,
        event_shape=event.shape,
        target_shape=target.shape,
        depth=cfg.depth or strategy.DEPTH,
        patch=cfg.patch,
        rank=len(training_split(cfg, store).train) if strategy.REQUIRES == "pairs" else cfg.rank,
        mean_start=cfg.init == "pca" and strategy.PCA_REQUIRES == "means",
    )


def make_objective(cfg: TrainConfig, store: PairStore, adapter: Adapter, start: InitStats) -> AlignmentObjective:
    """The adapter with the losses and the augmentation of a run."""
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
    mean_target = start["target_mean"] if cfg.centred_weight else None
    return AlignmentObjective(adapter, weights, augmentation(cfg, store), mean_target)


def augmentation(cfg: TrainConfig, store: PairStore) -> Augmentation | None:
    """What a run asks for. ConfigError where the features are no images."""
    changes = {name: getattr(cfg, name) for name in ("flip", "shift", "event_dropout", "event_noise")}
    if not any(changes.values()):
        return None
    return Augmentation(store.feature("event").shape, store.feature("target").shape, **changes)


def parameters(cfg: TrainConfig, store: PairStore) -> int:
    """Trained numbers of a run's adapter."""
    with torch.device("meta"):
        config = adapter_config(cfg, store)
        return num_parameters(STRATEGIES[config.strategy](config))


def beside_bytes(cfg: TrainConfig, store: PairStore) -> int:
    """Bytes of what a run's adapter holds and does not train: means, bases, pairs."""
    with torch.device("meta"):
        config = adapter_config(cfg, store)
        return sum(buffer.nbytes for buffer in STRATEGIES[config.strategy](config).buffers())


def resume_or_init(
    cfg: TrainConfig, store: PairStore, name: str | None, device: torch.device, known: InitStats | None = None
) -> TrainState:
    """The state of a place in this run, or the run's beginning. CheckpointError names a file that does not hold.

    `known`: what it begins with, where that is in memory already.
    """
    run = RunDir(cfg.folder)
    wanted = init_requirement(cfg) != "nothing" and (name is None or cfg.centred_weight > 0)
    start = (known or load_start(cfg, store)) if wanted else {}
    if name is None:
        adapter = build_adapter(adapter_config(cfg, store), cfg.seed)
        if start:
            adapter.initialize_from(start, pca=cfg.init == "pca")
    else:
        adapter = load_checkpoint(run.checkpoint(name)).adapter
    objective = make_objective(cfg, store, adapter, start).to(device)
    optimizer = make_optimizer(objective, cfg.learning_rate, cfg.weight_decay)
    state = TrainState(objective, optimizer, make_schedule(cfg, optimizer))
    if name is not None:
        state.load(*load_training_state(run.state(name)))
    return state


def make_schedule(cfg: TrainConfig, optimizer: AdamW) -> ReduceLROnPlateau | CosineByEpoch:
    """How the learning rate falls."""
    if cfg.schedule == "cosine":
        return CosineByEpoch(optimizer, cfg.learning_rate, cfg.num_epochs)
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=cfg.plateau_patience)


def broadcast_resume_point(run: RunDir, rank: int, world: int, device: torch.device) -> str | None:
    """The newest verified place of a run, found by the first worker and told to the others."""
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
    """Saves and tells, on the first worker; on the others there is none."""

    run: RunDir
    """Where."""
    store: PairStore
    """What it is trained on."""
    log: EventLog
    """What is told."""
    provenance: dict[str, Any]
    """Written into each checkpoint."""

    def begin(self, state: TrainState, workers: int) -> None:
        """Notes that the run goes on, and does what a worker that died right after a save could not do any more."""
        if not state.step:
            return
        self.log.write("resumed", epoch=state.epoch, global_step=state.step, workers=workers, time=time.time())
        self.run.prune_checkpoints(state.checkpoint_name, state.best_epoch)
        if state.best_epoch and not state.sums.batches:  # none: the place is another run's, which has told of it
            metrics = json.loads((self.run.checkpoint(state.checkpoint_name) / "metrics.json").read_text())
            self._tell_epoch(state, metrics, 0.0)

    def step(self, state: TrainState, loss: float, cos_sim: float, done: StepResult, workers: int) -> None:
        """One optimizer step; the means are over all of so many workers."""
        means = {"loss": loss, "cos_sim": cos_sim, "grad_norm": done.grad_norm}
        so_far = {"epoch": state.epoch + 1, "pairs": state.sums.pairs, "seconds": state.sums.seconds}
        self.log.step(state.step, workers=workers, **means, **so_far)

    def within_epoch(self, state: TrainState) -> Path:
        """Saves in the middle of an epoch."""
        self._save(state, {"epoch": state.epoch, "step": state.step, "train": state.sums.means()})
        return self.run.checkpoint(state.checkpoint_name)

    def end_of_epoch(self, state: TrainState, train: dict[str, Any], val: dict[str, Any]) -> None:
        """Saves after an epoch that `state` has taken note of, and tells of it."""
        metrics = {"epoch": state.epoch, "train": train, "val": val}
        self._tell_epoch(state, metrics, self._save(state, metrics))

    def _save(self, state: TrainState, metrics: dict[str, Any]) -> float:
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
        )
        return time.perf_counter() - began

    def _tell_epoch(self, state: TrainState, metrics: dict[str, Any], save_seconds: float) -> None:
        self.log.epoch(
            **metrics, save_seconds=save_seconds, learning_rate=state.learning_rate, global_step=state.step
        )

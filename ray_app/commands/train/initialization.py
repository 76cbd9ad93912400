"""What the training part gives before the first step, computed once and kept in RUN/init.

Through Ray Data batches and their order are the store's, whatever the number of workers.

Shapes: B = pairs of a batch, E, D = widths of event and target, R = rank, V = pairs of the validation part.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from ray.data import Dataset

from ray_app.config.train import TrainConfig
from ray_app.core.adapters.base import InitRequirement, InitStats
from ray_app.core.adapters.initialization import Part, Sums, find_start, solve_ridge
from ray_app.core.adapters.registry import STRATEGIES
from ray_app.core.optimizer_step import decode
from ray_app.data.pair_tensors import PairTensors
from ray_app.data.pairs_dataset import load_pair_tensors, to_arrays
from ray_app.errors import ConfigError
from ray_app.store.checkpoint import load_training_state, save_training_state
from ray_app.store.pair_store import PairStore
from ray_app.store.split import Split, split_pairs

INIT = "init"
BATCH = 128
"""Pairs whose sums are taken in one task: 154 MB of float32 a side at 150,528 wide."""
CPU = torch.device("cpu")


def init_requirement(cfg: TrainConfig) -> InitRequirement:
    """How much of a start a run needs. ConfigError: a PCA start of a strategy that has no layers for it."""
    strategy = STRATEGIES[cfg.strategy]
    if cfg.init == "pca" and strategy.REQUIRES != "subspaces":
        if strategy.PCA_REQUIRES == "nothing":
            can = [name for name, each in STRATEGIES.items() if "subspaces" in (each.PCA_REQUIRES, each.REQUIRES)]
            raise ConfigError(
                f"--init pca sets full-width layers, and {cfg.strategy} has none to set; leave it out, or use "
                f"one of: {', '.join(can)}"
            )
        return strategy.PCA_REQUIRES
    return "means" if strategy.REQUIRES == "nothing" and cfg.centred_weight else strategy.REQUIRES


def external_init_dir(cfg: TrainConfig) -> Path | None:
    """The start of another run, if it is of use: not to a last run, whose validation part trains too."""
    return cfg.init_from if not cfg.train_on_val else None


def init_dir(cfg: TrainConfig) -> Path:
    """Where a run's start lies."""
    return external_init_dir(cfg) or cfg.folder / INIT


def load_start(cfg: TrainConfig, store: PairStore) -> InitStats:
    """Verified. CheckpointError: damaged. ConfigError: of other pairs, or of less than this run needs."""
    folder = init_dir(cfg)
    start, about = load_training_state(folder)
    if {key: about.get(key) for key in origin(cfg, store)} != origin(cfg, store):
        raise ConfigError(
            f"--init-from {folder} was computed from other training pairs than this run's; leave it out"
        )
    if init_requirement(cfg) != "subspaces":
        return start
    found = start["event_basis"].shape[1] if "event_basis" in start else 0
    if found < cfg.rank:
        raise ConfigError(
            f"--init-from {folder} holds subspaces of rank {found}, --rank is {cfg.rank}; leave --init-from out"
        )
    return truncate_rank(start, cfg.rank)


def origin(cfg: TrainConfig, store: PairStore) -> dict[str, Any]:
    """What a start is computed from."""
    split = {name: getattr(cfg, name) for name in ("split", "split_seed", "test_share", "val_share", "train_on_val")}
    return {"store": store.fingerprint, "durations": list(cfg.durations), **split}


def truncate_rank(start: InitStats, rank: int) -> InitStats:
    """The first directions of subspaces of this rank or a higher one."""
    found = start["event_basis"].shape[1]
    if rank == found:
        return start
    return {
        key: value[..., :rank].contiguous() if key.endswith(("_basis", "_scale")) else value
        for key, value in start.items()
    }


class TrainingPairs(Protocol):
    """Where a start finds the pairs of a run."""

    def reduce_over_batches(self, part: Part) -> Sums:
        """Once over the training part."""

    def held(self, part: str) -> PairTensors:
        """All pairs of `train` or `val` in memory."""


def make_start(cfg: TrainConfig, store: PairStore, split: Split, pairs: TrainingPairs) -> None:
    """Computes what the run needs, unless it lies there already or is given."""
    level, folder = init_requirement(cfg), init_dir(cfg)
    if level == "nothing" or external_init_dir(cfg) or folder.exists():
        return
    began = time.perf_counter()
    tokens = store.feature("target").token_width
    start = find_start(pairs.reduce_over_batches, level, cfg.rank, len(split.train), cfg.seed, tokens)
    chosen: dict[str, Any] = {}
    if level == "pairs":
        start, cosines = solve_ridge_init(cfg, store, split, pairs, start)
        chosen = {"mean_cosine_on_validation": {f"{relative:g}": cos for relative, cos in cosines.items()}}
    seconds = round(time.perf_counter() - began, 3)
    save_training_state(folder, start, {**origin(cfg, store), **chosen, "seconds": seconds})


def solve_ridge_init(
    cfg: TrainConfig, store: PairStore, split: Split, pairs: TrainingPairs, start: InitStats
) -> tuple[InitStats, dict[float, float]]:
    """The ridge solution of the training part, and the mean cosine on validation of each λ.

    Of a last run, whose training part holds validation too, λ is what the rest of it chose on those pairs.
    ConfigError: there are none.
    """
    train, units = pairs.held("train"), (store.feature("event").scale, store.feature("target").scale)
    if len(split.val):
        held = pairs.held("val")
        return solve_ridge(start, (train.event_BE, held.event_BE), (train.target_BD, held.target_BD), units)
    inside = torch.from_numpy(np.isin(split.train, split_pairs(store.index, cfg.split_config).val))
    if not inside.any():
        raise ConfigError(
            "ridge chooses its regularisation on the validation part, which is empty: prepare more pairs, or raise "
            "--val-share"
        )
    rest, val = ((train.event_BE[rows], train.target_BD[rows]) for rows in (~inside, inside))
    event, target = zip(rest, val, strict=True)
    means = [
        (side.sum(dim=0, dtype=torch.float64) / len(side) * unit).float()
        for side, unit in zip(rest, units, strict=True)
    ]
    _, cosines = solve_ridge({"event_mean": means[0], "target_mean": means[1]}, event, target, units)
    best = max(cosines, key=lambda relative: cosines[relative])
    sides = (train.event_BE, val[0]), (train.target_BD, val[1])
    whole, _ = solve_ridge(start, *sides, units, grid=(best,))
    return whole, cosines


@dataclass(frozen=True, slots=True)
class PairsInMemory:
    """Of a process that holds them: a trial of a sweep."""

    store: PairStore
    """How they are decoded."""
    train: PairTensors
    """All training pairs."""
    val: PairTensors
    """All validation pairs."""

    def reduce_over_batches(self, part: Part) -> Sums:
        return functools.reduce(_added, (part(*batch) for batch in self._batches(self.train)))

    def held(self, part: str) -> PairTensors:
        return {"train": self.train, "val": self.val}[part]

    def _batches(self, held: PairTensors) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for event_BE, target_BD in zip(held.event_BE.split(BATCH), held.target_BD.split(BATCH), strict=True):
            yield decode_pair(self.store, event_BE, target_BD)


@dataclass(frozen=True, slots=True)
class PairsThroughRay:
    """Of data sets of pairs, batch by batch in Ray tasks; sums are added in the order of the batches."""

    store: PairStore
    """How they are decoded."""
    split: Split
    """The parts."""
    datasets: Mapping[str, Dataset]
    """`train` and, where it is not empty, `val`."""

    def reduce_over_batches(self, part: Part) -> Sums:
        task = functools.partial(sums_of, self.store, ray.put(part))
        rows = self._batches("train", task).iter_rows()
        sums = ({name: torch.as_tensor(np.array(value)) for name, value in row.items()} for row in rows)
        return functools.reduce(_added, sums)

    def held(self, part: str) -> PairTensors:
        rows = getattr(self.split, part)
        return load_pair_tensors(self.datasets[part], self.store, rows, np.arange(len(rows)))

    def _batches(self, part: str, task: Callable[[pa.Table], dict[str, NDArray[Any]]]) -> Dataset:
        dataset = self.datasets[part]
        dataset.context.execution_options.preserve_order = True
        return dataset.map_batches(task, batch_size=BATCH, batch_format="pyarrow")


def sums_of(store: PairStore, part: ray.ObjectRef, batch: pa.Table) -> dict[str, NDArray[Any]]:
    """One row with what a part says of a batch."""
    _, *sides = to_arrays(batch, store)
    sums: Sums = ray.get(part)(*decode_pair(store, *map(torch.tensor, sides)))
    return {name: value.numpy()[None] for name, value in sums.items()}


def decode_pair(
    store: PairStore, event_BE: torch.Tensor, target_BD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored features as float32."""
    event, target = store.feature("event"), store.feature("target")
    return decode(event_BE, event.scale, CPU), decode(target_BD, target.scale, CPU)


def _added(a: Sums, b: Sums) -> Sums:
    return {name: a[name] + b[name] for name in a}

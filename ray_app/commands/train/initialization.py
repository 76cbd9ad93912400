"""Statistics of the training part that a run needs before its first step, computed once and kept in RUN/init.

Through Ray Data batches and their order are the store's, whatever the number of workers.

Shapes: B = pairs of a batch, E, D = widths of event and target, R = rank.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from ray.data import Dataset

from ray_app.commands.train.context import RunContext
from ray_app.core.adapters.base import InitStats
from ray_app.core.adapters.initialization import Part, Sums, compute_stats, solve_ridge
from ray_app.core.optimizer_step import decode
from ray_app.data.pair_blocks import load_pair_tensors
from ray_app.data.pair_tensors import PairTensors
from ray_app.data.pairs_dataset import dataset_blocks, to_arrays
from ray_app.errors import ConfigError
from ray_app.store.checkpoint import load_training_state, save_training_state
from ray_app.store.pair_store import PairStore
from ray_app.store.split import Split, split_pairs

PAIRS_PER_PASS = 128
"""Pairs that one task sums: 154 MB of float32 a side at 150,528 wide."""
CPU = torch.device("cpu")


def load_init(context: RunContext) -> InitStats:
    """Load the statistics, verified. CheckpointError: damaged. ConfigError: of other pairs, or too few of them."""
    cfg, folder = context.cfg, context.init_dir
    init, metadata = load_training_state(folder)
    if {key: metadata.get(key) for key in _origin(context)} != _origin(context):
        raise ConfigError(
            f"--init-from {folder} was computed from other training pairs than this run's; leave it out"
        )
    if context.requires != "subspaces":
        return init
    rank = init["event_basis"].shape[1] if "event_basis" in init else 0
    if rank < cfg.rank:
        raise ConfigError(
            f"--init-from {folder} holds subspaces of rank {rank}, --rank is {cfg.rank}; leave --init-from out"
        )
    return truncate_rank(init, cfg.rank)


def _origin(context: RunContext) -> dict[str, Any]:
    """Identity of the pairs that statistics are computed from."""
    cfg = context.cfg
    split = {name: getattr(cfg, name) for name in ("split", "split_seed", "test_share", "val_share", "train_on_val")}
    return {"store": context.store.fingerprint, "durations": list(cfg.durations), **split}


def truncate_rank(init: InitStats, rank: int) -> InitStats:
    """Keep the first directions of subspaces of this rank or a higher one."""
    return init if rank == init["event_basis"].shape[1] else first_directions(init, rank)


def first_directions(tensors: InitStats, rank: int) -> dict[str, torch.Tensor]:
    """Keep at most so many directions of each subspace among these tensors."""
    return {
        key: value[..., :rank].contiguous() if key.endswith(("_basis", "_scale")) else value
        for key, value in tensors.items()
    }


class TrainingPairs(Protocol):
    """Source of the pairs that statistics are computed from."""

    def reduce_over_batches(self, part: Part) -> Sums:
        """Sum `part` over all batches of the training part."""

    def held(self, part: str) -> PairTensors:
        """All pairs of `train` or `val` in memory."""


def compute_init(context: RunContext, pairs: TrainingPairs) -> None:
    """Compute and save the statistics that the run needs, unless they exist or another run's are given."""
    cfg, split = context.cfg, context.split
    if not context.starts_from:
        return
    began = time.perf_counter()
    target = context.store.feature("target")
    tokens = target.token_width if target.is_ragged else None
    init = compute_stats(pairs.reduce_over_batches, context.requires, cfg.rank, len(split.train), cfg.seed, tokens)
    chosen: dict[str, Any] = {}
    if context.requires == "pairs":
        init, cosines = solve_ridge_init(context, pairs, init)
        chosen = {"mean_cosine_on_validation": {f"{relative:g}": cos for relative, cos in cosines.items()}}
    seconds = round(time.perf_counter() - began, 3)
    save_training_state(context.init_dir, init, {**_origin(context), **chosen, "seconds": seconds})


def solve_ridge_init(
    context: RunContext, pairs: TrainingPairs, init: InitStats
) -> tuple[InitStats, dict[float, float]]:
    """Solve ridge on the training part; also return the mean cosine on validation of each λ.

    With --train-on-val the training part holds the validation pairs: λ is the one that the other pairs choose on
    them. ConfigError: there are no validation pairs.
    """
    store, split = context.store, context.split
    train, units = pairs.held("train"), (store.feature("event").scale, store.feature("target").scale)
    if len(split.val):
        val = pairs.held("val")
        return solve_ridge(init, (train.event_BE, val.event_BE), (train.target_BD, val.target_BD), units)
    is_val = torch.from_numpy(np.isin(split.train, split_pairs(store.index, context.cfg.split_config).val))
    if not is_val.any():
        raise ConfigError(
            "ridge chooses its regularisation on the validation part, which is empty: prepare more pairs, or raise "
            "--val-share"
        )
    rest, chosen_on = ((train.event_BE[rows], train.target_BD[rows]) for rows in (~is_val, is_val))
    event, target = zip(rest, chosen_on, strict=True)
    means = [
        (side.sum(dim=0, dtype=torch.float64) / len(side) * unit).float()
        for side, unit in zip(rest, units, strict=True)
    ]
    _, cosines = solve_ridge({"event_mean": means[0], "target_mean": means[1]}, event, target, units)
    best = max(cosines, key=lambda relative: cosines[relative])
    sides = (train.event_BE, chosen_on[0]), (train.target_BD, chosen_on[1])
    whole, _ = solve_ridge(init, *sides, units, grid=(best,))
    return whole, cosines


@dataclass(frozen=True, slots=True)
class PairsInMemory:
    """Pairs of a process that holds them: a trial of a sweep."""

    store: PairStore
    """The opened store, which decodes them."""
    train: PairTensors
    """All training pairs."""
    val: PairTensors
    """All validation pairs."""

    def reduce_over_batches(self, part: Part) -> Sums:
        return functools.reduce(_added, (part(*batch) for batch in self._batches(self.train)))

    def held(self, part: str) -> PairTensors:
        return {"train": self.train, "val": self.val}[part]

    def _batches(self, held: PairTensors) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for event_BE, target_BD in zip(
            held.event_BE.split(PAIRS_PER_PASS), held.target_BD.split(PAIRS_PER_PASS), strict=True
        ):
            yield decode_pair(self.store, event_BE, target_BD)


@dataclass(frozen=True, slots=True)
class PairsThroughRay:
    """Pairs of data sets, batch by batch in Ray tasks; sums are added in the order of the batches."""

    store: PairStore
    """The opened store, which decodes them."""
    split: Split
    """Parts of the store."""
    datasets: Mapping[str, Dataset]
    """`train` and, where it is not empty, `val`."""

    def reduce_over_batches(self, part: Part) -> Sums:
        task = functools.partial(sums_of, self.store, ray.put(part))
        rows = self._batches("train", task).iter_rows()
        sums = ({name: torch.as_tensor(np.array(value)) for name, value in row.items()} for row in rows)
        return functools.reduce(_added, sums)

    def held(self, part: str) -> PairTensors:
        rows = getattr(self.split, part)
        blocks = dataset_blocks(self.datasets[part], self.store)
        return load_pair_tensors(blocks, self.store, rows, np.arange(len(rows)))

    def _batches(self, part: str, task: Callable[[pa.Table], dict[str, NDArray[Any]]]) -> Dataset:
        dataset = self.datasets[part]
        dataset.context.execution_options.preserve_order = True
        return dataset.map_batches(task, batch_size=PAIRS_PER_PASS, batch_format="pyarrow")


def sums_of(store: PairStore, part: ray.ObjectRef, batch: pa.Table) -> dict[str, NDArray[Any]]:
    """One row with the sums of a batch."""
    _, *sides = to_arrays(batch, store)
    sums: Sums = ray.get(part)(*decode_pair(store, *map(torch.tensor, sides)))
    return {name: value.numpy()[None] for name, value in sums.items()}


def decode_pair(
    store: PairStore, event_BE: torch.Tensor, target_BD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode stored features to float32."""
    event, target = store.feature("event"), store.feature("target")
    return decode(event_BE, event.scale, CPU), decode(target_BD, target.scale, CPU)


def _added(a: Sums, b: Sums) -> Sums:
    return {name: a[name] + b[name] for name in a}

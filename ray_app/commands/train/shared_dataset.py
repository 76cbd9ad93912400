"""Pairs of a sweep in Ray's shared memory: read, verified and decoded once by the driver.

Ray copies an object to a node's shared memory when the first process there asks for it; every process of the node
sees those very bytes. Only training and validation rows are read: the test part never is.

Shapes: N = pairs, B = pairs of a batch, E, D = widths of event and target.
"""

import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from ray_app.commands.train.context import RunContext, require_pairs
from ray_app.commands.train.initialization import (
    PairsInMemory,
    PairsThroughRay,
    TrainingPairs,
    compute_init,
    load_init,
    truncate_rank,
)
from ray_app.commands.train.loop import BaselineContext, Batches, WorkerContext, WorkerData, batches_in_memory
from ray_app.commands.train.state import TrainState
from ray_app.core.adapters.base import InitStats
from ray_app.core.evaluation import Baselines, TrainingMeans, derangement, fixed_baselines
from ray_app.core.metrics import AlignmentCounts
from ray_app.core.optimizer_step import decode
from ray_app.data.batch_order import ShardedBatchOrder
from ray_app.data.pair_tensors import PairTensors
from ray_app.data.pairs_dataset import iter_batches, pairs_dataset
from ray_app.data.training_means import training_means
from ray_app.errors import ConfigError, ResourceError
from ray_app.store.pair_store import PairStore
from ray_app.store.split import Split

SHARE = 0.8
"""Fraction of a node's shared memory that the pairs may take."""
PAIRS_PER_CHUNK = 128
"""Pairs decoded at a time for the baselines."""

SharedSide = Any
"""Reference to an array (N, width) in shared memory."""
InitKey = tuple[str, str]
"""Folder of given statistics (empty: computed here), and the kind of statistics."""


@dataclass(frozen=True, slots=True)
class SharedInit:
    """Initial statistics of one kind, of the largest rank that is searched and possible."""

    arrays: Any
    """Reference to the arrays by name in shared memory; None if there are none."""
    problem: str = ""
    """Why there are none, or none of a larger rank."""


@dataclass(frozen=True, slots=True)
class SharedDataset:
    """Pairs of one choice of durations."""

    store: PairStore
    """The opened store."""
    split: Split
    """Its parts."""
    train: tuple[SharedSide, SharedSide] | None
    """Event and target features; None if they do not fit, and trials stream them."""
    val: tuple[SharedSide, SharedSide]
    """Event and target features of the validation part."""
    baselines: Baselines | None
    """Baselines of the validation part; None for drafters, whose rows are no features."""
    inits: dict[InitKey, SharedInit] = field(default_factory=dict)
    """Initial statistics that trials need."""

    @property
    def num_bytes(self) -> int:
        """Bytes in shared memory."""
        return part_bytes(self.store, self.split.val) + (
            part_bytes(self.store, self.split.train) if self.train else 0
        )

    def describe(self) -> dict[str, Any]:
        """Sizes of the parts and the baselines' cosine_accept_rate at θ, as JSON values."""
        return {
            "train": len(self.split.train),
            "val": len(self.split.val),
            "test": len(self.split.test),
            "val_sequences": len(np.unique(self.store.index.sequence[self.split.val])),
            "split": self.split.label,
            "baselines": {name: counts.accept_rate() for name, counts in self.baselines.fixed.items()}
            if self.baselines
            else {},
        }


def part_bytes(store: PairStore, rows: NDArray[np.int64]) -> int:
    """Return the bytes of some pairs as stored."""
    return len(rows) * (store.feature("event").num_bytes + store.feature("target").num_bytes)


def share_dataset(store: PairStore, split: Split, free_bytes: float, *, with_baselines: bool = True) -> SharedDataset:
    """Read the training and validation part of a store and share them.

    A training part that does not fit is left out, with a line on standard error: trials stream it. StoreError: a part
    is empty. ResourceError: not even the validation part fits.
    """
    require_pairs(store, split, ("train", "val"))
    room = SHARE * free_bytes
    train_bytes, val_bytes = part_bytes(store, split.train), part_bytes(store, split.val)
    if val_bytes > room:
        raise ResourceError(
            f"the validation part has {val_bytes / 2**30:.1f} GiB, a node shares at most {room / 2**30:.1f} GiB "
            "(--object-store-memory of `ray start`); take a smaller `val_share`"
        )
    if train_bytes + val_bytes <= room:
        event_NE, target_ND = store.read_rows(split.train)
        means = TrainingMeans.of(target_ND, store.feature("target").token_width) if with_baselines else None
        train = (ray.put(event_NE), ray.put(target_ND))
        del event_NE, target_ND
    else:
        print(
            f"the training part has {train_bytes / 2**30:.1f} GiB and does not fit the shared memory of a node "
            f"({room / 2**30:.1f} GiB for it): every trial streams it from the store",
            file=sys.stderr,
        )
        train, means = None, training_means(store, split.train) if with_baselines else None
    event_NE, target_ND = store.read_rows(split.val)
    baselines = None
    if means:
        mean_target_D = means.mean_target(store.feature("target").scale)
        baselines = baselines_of(store, split, event_NE, target_ND, mean_target_D)
    return SharedDataset(store, split, train, (ray.put(event_NE), ray.put(target_ND)), baselines)


def baselines_of(
    store: PairStore, split: Split, event_NE: NDArray[Any], target_ND: NDArray[Any], mean_target_D: torch.Tensor
) -> Baselines:
    """Compute the baselines of the validation part."""
    fixed = count_fixed_baselines(store, event_NE, target_ND, mean_target_D)
    return Baselines(fixed, derangement(store.index.sequence[split.val].tolist(), seed=0))


def count_fixed_baselines(
    store: PairStore, event_NE: NDArray[Any], target_ND: NDArray[Any], mean_target_D: torch.Tensor
) -> dict[str, AlignmentCounts]:
    """Count the cosines of the baselines that need no adapter, on pairs as stored."""
    width = store.feature("target").token_width
    scales, cpu = [store.feature(side).scale for side in ("event", "target")], torch.device("cpu")
    fixed: dict[str, AlignmentCounts] = {}
    for rows in np.array_split(np.arange(len(event_NE)), -(-len(event_NE) // PAIRS_PER_CHUNK) or 1):
        event_BE, target_BD = (
            decode(torch.from_numpy(side[rows]), scale, cpu)
            for side, scale in zip((event_NE, target_ND), scales, strict=True)
        )
        images = store.feature("target").kind == "images"
        for name, cos_B in fixed_baselines(event_BE, target_BD, mean_target_D[None], width, images=images).items():
            fixed[name] = fixed.get(name, AlignmentCounts()) + AlignmentCounts.of(cos_B)
    return fixed


def shared_worker_data(data: SharedDataset, worker: WorkerContext) -> WorkerData:
    """View a worker's pairs in shared memory; training pairs that are not there are streamed."""
    cfg, store, split = worker.cfg, data.store, data.split
    train = shared_pairs(data.train).cut(worker.columns) if data.train else None
    val = shared_pairs(data.val).cut(worker.columns)
    rows = np.arange(worker.pair_rank, len(split.val), worker.pair_world)
    validation = val if worker.pair_world == 1 else PairTensors(rows, *val.take(rows))
    rest_of_epoch: Callable[[TrainState], Batches]
    if train:
        order = ShardedBatchOrder(len(split.train), cfg.batch_size, cfg.seed)

        def rest_of_epoch(state: TrainState) -> Batches:
            return batches_in_memory(train, order, state, worker)
    else:
        # Trials may have all CPUs, and reading is light: it claims none, or it would wait for their end.
        blocks = pairs_dataset(store, split.train, read_cpus=0.0).iterator()

        def rest_of_epoch(state: TrainState) -> Batches:
            return iter_batches(blocks, store, cfg.seed, state.epoch, worker.rank, worker.world, cfg.batch_size)

    baselines = BaselineContext(data.baselines, val) if data.baselines else None
    return WorkerData(rest_of_epoch, train is not None, validation, baselines)


def share_inits(data: SharedDataset, contexts: Iterable[RunContext], folder: Path) -> SharedDataset:
    """Add to the pairs what these runs start from, each kind once; what `folder` has is not computed again.

    Of runs that differ in rank alone the largest rank that the pairs have is computed: a smaller one takes its first
    directions.
    """
    kinds: dict[InitKey, dict[int, RunContext]] = {}
    for context in contexts:
        if context.requires != "nothing":
            kinds.setdefault(init_key(context), {})[context.cfg.rank] = context
    inits: dict[InitKey, SharedInit] = {}
    for key, by_rank in kinds.items():
        problem = ""
        for rank in sorted(by_rank, reverse=True):
            context = by_rank[rank].at(folder / key[1] / str(rank))
            try:
                compute_init(context, training_pairs(data))
                init = load_init(context)
            except ConfigError as error:
                problem = problem or str(error)
                continue
            shared_already = ("event_pairs", "target_pairs") if data.train else ()
            arrays = {name: value.numpy() for name, value in init.items() if name not in shared_already}
            inits[key] = SharedInit(ray.put(arrays), problem)
            break
        else:
            inits[key] = SharedInit(None, problem)
    return replace(data, inits=inits)


def training_pairs(data: SharedDataset) -> TrainingPairs:
    """Pairs out of shared memory, or through Ray Data if they do not fit there."""
    if data.train:
        return PairsInMemory(data.store, shared_pairs(data.train), shared_pairs(data.val))
    datasets = {name: pairs_dataset(data.store, getattr(data.split, name)) for name in ("train", "val")}
    return PairsThroughRay(data.store, data.split, datasets)


def init_key(context: RunContext) -> InitKey:
    """Return what settings that share initial statistics have in common, whatever their rank."""
    return str(context.init_from or ""), context.requires


def shared_init(data: SharedDataset, context: RunContext) -> InitStats | None:
    """View the initial statistics of a trial in shared memory; None if it needs none.

    ConfigError: the pairs do not give statistics of this rank.
    """
    if context.requires == "nothing":
        return None
    shared = data.inits[init_key(context)]
    arrays = ray.get(shared.arrays) if shared.arrays else {}
    init = {name: as_readonly_tensor(array) for name, array in arrays.items()}
    if not init or (context.requires == "subspaces" and init["event_basis"].shape[1] < context.cfg.rank):
        raise ConfigError(shared.problem)
    if context.requires == "pairs" and data.train:
        pairs = shared_pairs(data.train)
        init |= {"event_pairs": pairs.event_BE, "target_pairs": pairs.target_BD}
    return truncate_rank(init, context.cfg.rank) if context.requires == "subspaces" else init


def shared_pairs(sides: tuple[SharedSide, SharedSide]) -> PairTensors:
    """View all pairs of a part, without a copy."""
    event_NE, target_ND = ray.get(list(sides))
    return PairTensors(np.arange(len(event_NE)), as_readonly_tensor(event_NE), as_readonly_tensor(target_ND))


def as_readonly_tensor(array: NDArray[Any]) -> torch.Tensor:
    """View shared memory as a tensor; nothing may write to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)

"""Pairs of a sweep and what its trials start from: read once by the driver, shared in memory by the trials of a node.

Means and subspaces are computed once for a sweep and kept in its folder. Of settings that differ in rank alone, the
largest rank is computed; a smaller one takes its first directions.
"""

import sys
from dataclasses import replace
from pathlib import Path

import ray

from ray_app.commands.train.context import RunContext
from ray_app.commands.train.initialization import (
    PairsInMemory,
    PairsThroughRay,
    TrainingPairs,
    compute_init,
    load_init,
)
from ray_app.commands.train.shared_dataset import (
    InitKey,
    SharedDataset,
    SharedInit,
    init_key,
    share_dataset,
    shared_pairs,
)
from ray_app.commands.tune.estimate import accepted_contexts, candidates, corners
from ray_app.commands.tune.spec import Choice, SweepSpec, data_key, space_of, train_config
from ray_app.commands.tune.sweep_dir import SweepDir
from ray_app.config.train import TrainConfig
from ray_app.data.pairs_dataset import pairs_dataset
from ray_app.errors import ConfigError, ResourceError, StoreError
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs

INITS_DIR = "init"
"""Folder of a sweep that keeps what its trials start from."""


def open_stores(spec: SweepSpec) -> dict[str, PairStore]:
    """The store, opened once for each choice of durations."""
    durations = space_of(spec).get("durations")
    choices = durations.values if isinstance(durations, Choice) else (None,)
    configs = [train_config(spec, {"durations": value} if value else {}, spec.out) for value in choices]
    return {data_key(config): PairStore.open(spec.store, config.durations) for config in configs}


def require_same_store(folder: SweepDir, stores: dict[str, PairStore]) -> None:
    """Raise StoreError unless the pairs are those that the sweep started with."""
    fingerprint, store = folder.metadata()["store_fingerprint"], next(iter(stores.values()))
    if store.fingerprint != fingerprint:
        raise StoreError(
            f"{folder} searched on pairs of fingerprint {fingerprint}, {store.folder} now has {store.fingerprint}: "
            "its trials could not be compared. Restore the old store, or start a new sweep."
        )


def share_parts(spec: SweepSpec, stores: dict[str, PairStore]) -> dict[str, SharedDataset]:
    """Put training and validation pairs into shared memory, by choice of durations. ResourceError: no room."""
    nodes = [node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"]]
    splits = {key: split_pairs(store.index, spec.split_config) for key, store in stores.items()}
    for key, split in splits.items():
        tested = set(stores[key].index.sequence[split.test].tolist())
        for other, other_split in splits.items():
            trained = set(stores[other].index.sequence[other_split.train].tolist())
            if split.by == "sequence" and (both := tested & trained):
                print(
                    f"durations {key} test on {len(both)} drives that durations {other} train on: their numbers "
                    "are of different drives",
                    file=sys.stderr,
                )
    placed = {key: share_dataset(store, splits[key], min(nodes) / len(stores)) for key, store in stores.items()}
    if spec.num_workers > 1 and not all(part.train for part in placed.values()):
        raise ResourceError(
            "trials of several workers need the training pairs in shared memory, where they do not fit; take "
            "`num_workers: 1`, or nodes with more (--object-store-memory of `ray start`)"
        )
    return placed


def with_starts(spec: SweepSpec, placed: dict[str, SharedDataset], folder: Path) -> dict[str, SharedDataset]:
    """Add to the pairs all that a setting of the space starts from; what `folder` has is not computed again."""
    space = space_of(spec)
    wanted: dict[tuple[str, InitKey], RunContext] = {}
    for context in accepted_contexts(spec, corners(space) + candidates(spec), placed):
        if context.requires != "nothing":
            wanted.setdefault((data_key(context.cfg), init_key(context)), context)
    inits: dict[str, dict[InitKey, SharedInit]] = {key: {} for key in placed}
    for (key, kind), context in wanted.items():
        ranks = sorted(map(int, space["rank"].bounds), reverse=True) if "rank" in space else [context.cfg.rank]
        inits[key][kind] = make_shared_init(context.cfg.at(folder / f"{key}-{kind[1]}"), ranks, placed[key])
    return {key: replace(part, inits=inits[key]) for key, part in placed.items()}


def make_shared_init(cfg: TrainConfig, ranks: list[int], part: SharedDataset) -> SharedInit:
    """Initial weights of trials, of the first of these ranks that the pairs have."""
    problem = ""
    for rank in ranks:
        ranked = cfg.at(cfg.folder / str(rank)).model_copy(update={"rank": rank})
        try:
            context = RunContext.of(ranked, part.store, part.split)
            compute_init(context, training_pairs(part))
            init = load_init(context)
        except ConfigError as error:
            problem = problem or str(error)
            continue
        already_shared = ("event_pairs", "target_pairs") if part.train else ()
        arrays = {name: value.numpy() for name, value in init.items() if name not in already_shared}
        return SharedInit(ray.put(arrays), problem)
    return SharedInit(None, problem)


def training_pairs(part: SharedDataset) -> TrainingPairs:
    """Pairs out of shared memory, or through Ray Data if they do not fit there."""
    if part.train:
        return PairsInMemory(part.store, shared_pairs(part.train), shared_pairs(part.val))
    datasets = {name: pairs_dataset(part.store, getattr(part.split, name)) for name in ("train", "val")}
    return PairsThroughRay(part.store, part.split, datasets)

"""What trials begin with, means and subspaces: found once for a sweep, kept in its folder, shared as its pairs are.

Of settings that need as much of the same pairs, the largest rank is found; a smaller one is its first directions.
"""

from dataclasses import replace
from pathlib import Path

import ray

from ray_app.commands.train.initialization import (
    PairsInMemory,
    PairsThroughRay,
    TrainingPairs,
    init_requirement,
    load_start,
    make_start,
)
from ray_app.commands.train.shared_dataset import Kind, SharedDataset, SharedInit, init_key, shared
from ray_app.commands.tune.driver import data_key
from ray_app.commands.tune.estimate import candidates, corners
from ray_app.commands.tune.spec import SweepSpec, space_of, train_config
from ray_app.config.train import TrainConfig
from ray_app.data.pairs_dataset import pairs_dataset
from ray_app.errors import ConfigError

INIT = "init"
"""Where a sweep keeps them."""


def with_starts(spec: SweepSpec, placed: dict[str, SharedDataset], folder: Path) -> dict[str, SharedDataset]:
    """The pairs with all that a setting of the space begins with; what lies in `folder` is not computed again."""
    space = space_of(spec)
    wanted: dict[tuple[str, Kind], TrainConfig] = {}
    for setting in corners(space) + candidates(spec):
        try:
            cfg = train_config(spec, setting, spec.out)
            if init_requirement(cfg) != "nothing":
                wanted.setdefault((data_key(cfg), init_key(cfg)), cfg)
        except ConfigError:  # such a trial says so itself
            continue
    starts: dict[str, dict[Kind, SharedInit]] = {key: {} for key in placed}
    for (key, kind), cfg in wanted.items():
        ranks = sorted(map(int, space["rank"].bounds), reverse=True) if "rank" in space else [cfg.rank]
        at = folder / f"{key}-{kind[1]}"
        starts[key][kind] = found(cfg.at(at), ranks, placed[key])
    return {key: replace(part, starts=starts[key]) for key, part in placed.items()}


def found(cfg: TrainConfig, ranks: list[int], part: SharedDataset) -> SharedInit:
    """The start of the first of these ranks that there is one for."""
    problem = ""
    for rank in ranks:
        tried = cfg.at(cfg.folder / str(rank)).model_copy(update={"rank": rank})
        try:
            make_start(tried, part.store, part.split, pairs_for_start(part))
            start = load_start(tried, part.store)
        except ConfigError as error:
            problem = problem or str(error)
            continue
        twice = ("event_pairs", "target_pairs") if part.train else ()  # they are shared already
        arrays = {name: value.numpy() for name, value in start.items() if name not in twice}
        return SharedInit(ray.put(arrays), problem)
    return SharedInit(None, problem)


def pairs_for_start(part: SharedDataset) -> TrainingPairs:
    """Out of shared memory, or through Ray Data where they are not there."""
    if part.train:
        return PairsInMemory(part.store, shared(part.train), shared(part.val))
    datasets = {name: pairs_dataset(part.store, getattr(part.split, name)) for name in ("train", "val")}
    return PairsThroughRay(part.store, part.split, datasets)

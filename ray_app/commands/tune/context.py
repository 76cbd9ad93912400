"""The facts of a sweep that follow from its settings and its stores, resolved once when the command starts."""

import contextlib
import itertools
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import ray

from ray_app.commands.evaluate.drafting import pairs_to_test_on, require_unseen_by_drafter
from ray_app.commands.train.context import RunContext
from ray_app.commands.train.shared_dataset import SharedDataset, share_dataset, share_inits
from ray_app.commands.tune.space import Space, bounds, draws, grid, needed_weights, read_space, train_config
from ray_app.commands.tune.trials import Setting
from ray_app.config.train import DraftTrainConfig, TrainConfig
from ray_app.config.tune import TuneConfig
from ray_app.errors import ConfigError, ResourceError
from ray_app.runs.run_dir import best_of_run
from ray_app.store.filesystem import absolute
from ray_app.store.pair_store import PairStore
from ray_app.store.split import Split, split_pairs

PATHS = ("init_from", "language_model", "projector_start", "drafter")
"""Settings of `base` that are paths."""
NUM_SAMPLED = 64
"""Random settings that represent a space with ranges."""
MAX_CORNERS = 512
"""Most combinations of choices that are looked at for the largest adapter."""


@dataclass(frozen=True, slots=True)
class SweepContext:
    """Settings, space and stores of one sweep, passed to everything that works for it."""

    cfg: TuneConfig
    """The sweep's settings; paths are absolute."""
    space: Space
    """Searched settings."""
    stores: dict[str, PairStore] = field(repr=False)
    """The opened store by window lengths, of which there are several if `durations` is searched."""
    splits: dict[str, Split] = field(repr=False)
    """Its parts, by window lengths."""
    typical: tuple[RunContext, ...] = field(default=(), repr=False)
    """Runs of settings that a trial may have, for means over the space."""
    extreme: tuple[RunContext, ...] = field(default=(), repr=False)
    """Runs of settings that include the largest adapter and every choice."""

    @classmethod
    def open(cls, cfg: TuneConfig) -> Self:
        """Open the stores and resolve all facts. ConfigError: the space cannot be searched. StoreError: no store."""
        base = {name: absolute(value) if name in PATHS else value for name, value in cfg.base.items()}
        if "drafter" in base:
            base["drafter"] = best_of_run(base["drafter"])
        places = {name: absolute(value) for name in ("store", "out", "test_store") if (value := getattr(cfg, name))}
        cfg = cfg.model_copy(update={**places, "base": base})
        space = read_space(cfg)
        lengths = bounds(space["durations"]) if "durations" in space else [None]
        some = needed_weights(cfg, space)
        configs = [train_config(cfg, {**some, **({"durations": value} if value else {})}) for value in lengths]
        stores = {data_key(each): PairStore.open(cfg.store, each.durations) for each in configs}
        splits = {key: split_pairs(store.index, cfg.split_config) for key, store in stores.items()}
        sweep = cls(cfg, space, stores, splits)
        if cfg.drafting:
            sweep._require_drafter()
        typical = sweep._runs(typical_settings(cfg, space))
        extreme = sweep._runs(extreme_settings(space)) + typical
        if not extreme:
            raise ConfigError("`train` refuses every combination of this space; change `space` or `base`")
        return replace(sweep, typical=typical, extreme=extreme)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the store."""
        return next(iter(self.stores.values())).fingerprint

    def run(self, setting: Setting, out: str = "") -> RunContext:
        """Facts of a trial's run. ConfigError: `train` refuses the setting."""
        cfg = train_config(self.cfg, setting, out)
        return RunContext.of(cfg, self.stores[data_key(cfg)], self.splits[data_key(cfg)])

    def _require_drafter(self) -> None:
        """Raise the error of a trial of a drafter whose files are missing or do not fit, or that has seen too much.

        CheckpointError, InputError, StoreError: as `train` raises them. ConfigError also if it was trained on pairs
        that are to compare trials, or to test the winner.
        """
        run = self.run(extreme_settings(self.space)[0])
        assert isinstance(run.cfg, DraftTrainConfig)
        if self.cfg.final:
            require_unseen_by_drafter(run.cfg, *pairs_to_test_on(self.cfg, self.cfg.test_store, run.store), "test")
        require_unseen_by_drafter(run.cfg, run.store, run.split.val, "validation", ("train",))

    def _runs(self, settings: Iterable[Setting]) -> tuple[RunContext, ...]:
        runs = []
        for setting in settings:
            with contextlib.suppress(ConfigError):  # a combination that `train` refuses fails as a trial
                runs.append(self.run(setting))
        return tuple(runs)

    def share(self) -> dict[str, SharedDataset]:
        """Put training and validation pairs into shared memory, by window lengths. ResourceError: no room."""
        for (key, split), (other, other_split) in itertools.permutations(self.splits.items(), 2):
            tested = set(self.stores[key].index.sequence[split.test].tolist())
            trained = set(self.stores[other].index.sequence[other_split.train].tolist())
            if split.by == "sequence" and (both := tested & trained):
                print(
                    f"durations {key} test on {len(both)} drives that durations {other} train on: their numbers "
                    "are of different drives",
                    file=sys.stderr,
                )
        room = min(node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"])
        room, with_baselines = room / len(self.stores), not self.cfg.drafting
        pairs = {
            key: share_dataset(store, self.splits[key], room, with_baselines=with_baselines)
            for key, store in self.stores.items()
        }
        if self.cfg.num_workers > 1 and not all(part.train for part in pairs.values()):
            raise ResourceError(
                "trials of several workers need the training pairs in shared memory, where they do not fit; take "
                "`num_workers: 1`, or nodes with more (--object-store-memory of `ray start`)"
            )
        return pairs

    def share_inits(self, pairs: Mapping[str, SharedDataset], folder: Path) -> dict[str, SharedDataset]:
        """Add to the pairs what trials start from; what `folder` has is not computed again."""
        return {
            key: share_inits(part, [run for run in self.extreme if data_key(run.cfg) == key], folder / key)
            for key, part in pairs.items()
        }


def data_key(cfg: TrainConfig) -> str:
    """Key of a run's pairs among those of a sweep: its window lengths."""
    return "+".join(cfg.durations) or "all"


def typical_settings(cfg: TuneConfig, space: Space) -> list[Setting]:
    """Settings of the first trials of a grid, else random ones."""
    if cfg.search_alg == "grid":
        return grid(space)[: cfg.max_trials]
    return list(itertools.islice(draws(space, cfg.seed), NUM_SAMPLED))


def extreme_settings(space: Space) -> list[Setting]:
    """Settings that include the largest adapter: numbers at their maximum, with every choice of anything else."""

    def ends(name: str) -> list[Any]:
        values = bounds(space[name])
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        return [max(values)] if numbers else values

    corners = itertools.product(*map(ends, space))
    return [dict(zip(space, values, strict=True)) for values in itertools.islice(corners, MAX_CORNERS)]

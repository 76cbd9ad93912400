"""What the training part gives before the first step, computed once through Ray Data and kept in RUN/start.

Batches and their order are the store's, whatever the number of workers. The sums of each batch are added up here.

Shapes: B = pairs of a batch, E, D = widths of event and target, R = rank, N = pairs of a part.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from ray.data import Dataset

from ray_app.config import TrainConfig
from ray_app.core.adapter import STRATEGIES
from ray_app.core.compressed import compress
from ray_app.core.layers import Needs, Start
from ray_app.core.start import Part, Passes, Sums, find_start, solve_ridge
from ray_app.core.step import decode
from ray_app.errors import ConfigError
from ray_app.jobs.shards import Held, hold, to_arrays
from ray_app.store.checkpoint import load_training_state, save_training_state
from ray_app.store.pair_store import PairStore
from ray_app.store.split import Rows, Split

BATCH = 128
"""Pairs whose sums are taken in one task: 154 MB of float32 a side at 150,528 wide."""
CPU = torch.device("cpu")


def needs(cfg: TrainConfig) -> Needs:
    """How much of a start a run needs. ConfigError: a spectral start of a strategy that has no layers for it."""
    strategy = STRATEGIES[cfg.strategy]
    if cfg.init == "spectral" and strategy.NEEDS != "subspaces":
        if not strategy.SPECTRAL:
            can = ", ".join(name for name, each in STRATEGIES.items() if each.SPECTRAL or each.NEEDS == "subspaces")
            raise ConfigError(
                f"--init spectral sets full-width layers, and {cfg.strategy} has none to set; leave it out, or use "
                f"one of: {can}"
            )
        return "subspaces"
    return "means" if strategy.NEEDS == "nothing" and cfg.centred_weight else strategy.NEEDS


def folder_of(cfg: TrainConfig) -> Path:
    """Where a run's start lies."""
    return cfg.start or cfg.out / "start"


def load_start(cfg: TrainConfig, store: PairStore) -> Start:
    """Verified. CheckpointError: damaged. ConfigError: of other pairs, or of less than this run needs."""
    folder = folder_of(cfg)
    start, about = load_training_state(folder)
    if {key: about.get(key) for key in origin(cfg, store)} != origin(cfg, store):
        raise ConfigError(f"--start {folder} was computed from other training pairs than this run's; leave it out")
    if needs(cfg) != "subspaces":
        return start
    found = start["event_basis"].shape[1] if "event_basis" in start else 0
    if found < cfg.rank:
        raise ConfigError(
            f"--start {folder} holds subspaces of rank {found}, --rank is {cfg.rank}; leave --start out"
        )
    if cfg.space == "compressed" and "train_records" not in start:
        raise ConfigError(
            f"--start {folder} holds no compressed pairs; leave it out, or compute it with --space compressed"
        )
    return cut(start, cfg.rank)


def origin(cfg: TrainConfig, store: PairStore) -> dict[str, Any]:
    """What a start is computed from."""
    split = {name: getattr(cfg, name) for name in ("split", "split_seed", "test_share", "val_share")}
    return {"store": store.fingerprint, "durations": list(cfg.durations), **split}


def cut(start: Start, rank: int) -> Start:
    """The first directions of subspaces of this rank or a higher one, and what is recorded in them."""
    found = start["event_basis"].shape[1]
    first = {
        key: value[..., :rank].contiguous()
        for key, value in start.items()
        if key.endswith(("_basis", "_scale", "_coordinates"))
    }
    records = {
        key: torch.cat([value[:, :rank], value[:, found : found + rank], value[:, 2 * found :]], dim=1)
        for key, value in start.items()
        if key.endswith("_records")
    }
    return {**start, **first, **records}


def make_start(cfg: TrainConfig, store: PairStore, split: Split, datasets: Mapping[str, Dataset]) -> None:
    """Computes what the run needs, unless it lies there already or is given. `datasets`: `train` and `val`."""
    level, folder = needs(cfg), folder_of(cfg)
    if level == "nothing" or cfg.start or folder.exists():
        return
    passes = through(store, datasets["train"])
    start = find_start(passes, level, cfg.rank, len(split.train), cfg.seed)
    chosen: dict[str, Any] = {}
    if level == "pairs":
        train, val = (
            hold(datasets[part], store, rows, np.arange(len(rows)))
            for part, rows in (("train", split.train), ("val", split.val))
        )
        units = store.feature("event").scale, store.feature("target").scale
        sides = (train.event_BE, val.event_BE), (train.target_BD, val.target_BD)
        start, cosines = solve_ridge(start, *sides, units)
        chosen = {"mean_cosine_on_validation": {f"{relative:g}": cos for relative, cos in cosines.items()}}
    if cfg.space == "compressed":
        for part in ("train", "val"):
            start = {**start, **recorded(store, datasets[part], getattr(split, part), part, start)}
    save_training_state(folder, start, {**origin(cfg, store), **chosen})


def through(store: PairStore, dataset: Dataset) -> Passes:
    """Passes over a data set of pairs, batch by batch in Ray tasks, the sums added in the order of the batches."""
    dataset.context.execution_options.preserve_order = True

    def passes(part: Part) -> Sums:
        task = functools.partial(sums_of, store, ray.put(part))
        total: dict[str, torch.Tensor] = {}
        for row in dataset.map_batches(task, batch_size=BATCH, batch_format="pyarrow").iter_rows():
            for name, value in row.items():
                found = torch.as_tensor(np.array(value))
                total[name] = total[name] + found if name in total else found
        return total

    return passes


def sums_of(store: PairStore, part: ray.ObjectRef, batch: pa.Table) -> dict[str, NDArray[Any]]:
    """One row with what a part says of a batch."""
    sums: Sums = ray.get(part)(*features(store, batch))
    return {name: value.numpy()[None] for name, value in sums.items()}


def features(store: PairStore, batch: pa.Table) -> tuple[torch.Tensor, torch.Tensor]:
    """(events (B, E), targets (B, D)), float32."""
    _, event_BE, target_BD = to_arrays(batch, store)
    event, target = store.feature("event"), store.feature("target")
    return decode(torch.tensor(event_BE), event.scale, CPU), decode(torch.tensor(target_BD), target.scale, CPU)


def recorded(store: PairStore, dataset: Dataset, rows: Rows, part: str, start: Start) -> dict[str, torch.Tensor]:
    """`<part>_coordinates` (N, R) and `<part>_records` (N, 2 R + 5), in the order of `rows`."""
    held = ray.put(start)

    def task(batch: pa.Table) -> dict[str, NDArray[Any]]:
        coordinates_BR, records = compress(*features(store, batch), ray.get(held))
        position_B = batch["position"].to_numpy()
        return {"position": position_B, "coordinates": coordinates_BR.numpy(), "records": records.numpy()}

    batches = list(
        dataset.map_batches(task, batch_size=BATCH, batch_format="pyarrow").iter_batches(
            batch_size=None, batch_format="numpy"
        )
    )
    order = np.argsort(np.concatenate([batch["position"] for batch in batches]))
    assert len(order) == len(rows)
    return {
        f"{part}_{name}": torch.from_numpy(np.concatenate([batch[name] for batch in batches])[order])
        for name in ("coordinates", "records")
    }


def held_compressed(cfg: TrainConfig, store: PairStore, part: str, wanted: NDArray[np.int64]) -> Held:
    """Some pairs of a part, in the few numbers that stand for them."""
    start = load_start(cfg, store)
    return Held(wanted, start[f"{part}_coordinates"][wanted], start[f"{part}_records"][wanted])

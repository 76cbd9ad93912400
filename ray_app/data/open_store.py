"""A pair store from Python: its parts as numpy arrays or torch tensors, read and verified in this process.

Shapes: N = pairs of a part, E, D = widths of event and target, D… = the feature's own shape.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_app.config.base import SplitConfig
from ray_app.core.evaluation import TrainingMeans
from ray_app.core.optimizer_step import decode
from ray_app.errors import ConfigError, StoreError
from ray_app.store.manifest import Features
from ray_app.store.pair_store import PairStore
from ray_app.store.split import Rows, Split, split_pairs

PartName = Literal["train", "val", "test", "all"]
CHUNK_PAIRS = 256
"""Pairs that are read at a time."""
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, repr=False)
class Store:
    """An opened pair store. Its split is that of `train` and `evaluate`."""

    pairs: PairStore
    """Manifest and index; features are read by `part`."""
    split_config: SplitConfig
    """Settings of the split."""
    split: Split
    """Positions of each part."""

    def part(self, name: PartName = "all") -> "Part":
        """Return a part: `train`, `val`, `test` or `all`. ConfigError: another name. StoreError: it is empty."""
        parts = {
            "train": self.split.train,
            "val": self.split.val,
            "test": self.split.test,
            "all": np.arange(len(self)),
        }
        if name not in parts:
            raise ConfigError(f"a store has the parts {', '.join(parts)}, not '{name}'")
        if not len(parts[name]):
            raise StoreError(f"{self.pairs.folder} has too few pairs: its {name} part is empty")
        return Part(self, name, parts[name])

    @property
    def features(self) -> Features:
        """Type, shape and scale of both sides."""
        return self.pairs.manifest.features

    def __len__(self) -> int:
        return len(self.pairs.index)

    def __repr__(self) -> str:
        split, manifest = self.split, self.pairs.manifest
        return (
            f"Store({str(self.pairs.folder)!r}: {len(self):,} pairs of {manifest.sequences:,} sequences, train "
            f"{len(split.train):,}, val {len(split.val):,}, test {len(split.test):,}; event {self.features.event}, "
            f"target {self.features.target})"
        )


@dataclass(frozen=True, slots=True, repr=False)
class Part:
    """Some pairs of a store, in its order. Every read is verified against the store's checksums."""

    store: Store
    """Store of the pairs."""
    name: str
    """Name of the part."""
    rows: Rows
    """Positions in the store."""

    def numpy(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return (events, targets) as stored, shapes (N, E…) and (N, D…); sequences end in zeros.

        uint8 images are what `align` takes; times the scale they are the values that a model sees.
        """
        event_NE, target_ND = self.store.pairs.read_rows(self.rows)
        shapes = self.store.features.event.shape, self.store.features.target.shape
        return event_NE.reshape(-1, *shapes[0]), target_ND.reshape(-1, *shapes[1])

    def torch(self) -> tuple[Tensor, Tensor]:
        """Return (events, targets) as an adapter sees them: float32 values of shapes (N, E) and (N, D)."""
        event, target = self.store.features.event, self.store.features.target
        event_NE, target_ND = self.store.pairs.read_rows(self.rows)
        return (
            decode(torch.from_numpy(event_NE), event.scale, CPU),
            decode(torch.from_numpy(target_ND), target.scale, CPU),
        )

    @property
    def sequences(self) -> NDArray[np.str_]:
        """Name of each pair's sequence, shape (N,)."""
        return self.store.pairs.index.sequence[self.rows]

    @property
    def t_start_us(self) -> NDArray[np.int64]:
        """Start of each pair's window in microseconds, shape (N,)."""
        return self.store.pairs.index.t_start_us[self.rows]

    def batches(self, size: int = CHUNK_PAIRS) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """Yield stored (events, targets) of at most `size` pairs, flat, so that memory is bounded."""
        for first in range(0, len(self), size):
            yield self.store.pairs.read_rows(self.rows[first : first + size])

    def mean_target(self) -> Tensor:
        """Mean target, shape (D,), as an adapter sees it."""
        target = self.store.features.target
        total = TrainingMeans(0, np.zeros(target.width))
        for _, target_BD in self.batches():
            total += TrainingMeans.of(target_BD, target.token_width)
        return total.mean_target(target.scale)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Part({self.name!r} of {str(self.store.pairs.folder)!r}: {len(self):,} pairs)"


def open_store(
    where: str | Path,
    *,
    split: Literal["sequence", "window"] = "sequence",
    split_seed: int = 42,
    test_share: float = 0.2,
    val_share: float = 0.1,
    durations: Sequence[str] = (),
) -> Store:
    """Open the pair store in a folder or at a URI; the split's settings are those of `train`.

    StoreError: there is none, it is damaged, or it has no windows of these durations.
    """
    config = SplitConfig(by=split, seed=split_seed, test=test_share, val=val_share)
    pairs = PairStore.open(where, tuple(durations))
    return Store(pairs, config, split_pairs(pairs.index, config))

"""Order of training: which pair is in which batch of which epoch, and on which worker.

The training pairs are shuffled once and dealt into lanes, one for each place of a global batch. In an epoch
each lane is permuted by a pure function of (seed, epoch, lane), and batch s takes the s-th pair of every lane
that has one. A worker holds neighbouring lanes as a whole, as many as another one or one more. So every number
of workers up to the batch sees the same global batches, each pair comes once an epoch, and any epoch's order is
known without the ones before.

Shapes: N = training pairs, B = pairs of a global batch = lanes, W = workers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_app.core.adapters.seeded_noise import derive_seed

Positions = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BatchSlice:
    """One worker's part of one global batch."""

    positions: Positions
    """Training pairs, as positions in 0 … N − 1; may be empty in the last batch."""
    first_row: int
    """Row of the first of them in the global batch."""
    global_rows: int
    """Number of pairs of the global batch."""


@dataclass(frozen=True, slots=True)
class ShardedBatchOrder:
    """Order of the batches of one run."""

    num_pairs: int
    """N."""
    num_lanes: int
    """B."""
    seed: int
    """Seed of the run."""

    @property
    def steps(self) -> int:
        """Number of batches in an epoch."""
        return -(-self.num_pairs // self.num_lanes)

    def lanes(self) -> list[Positions]:
        """Return the pairs of each lane, in the order they were dealt."""
        dealt = np.random.default_rng(derive_seed(self.seed)).permutation(self.num_pairs)
        return [dealt[lane :: self.num_lanes] for lane in range(self.num_lanes)]

    def held(self, rank: int, world: int) -> Positions:
        """Return every pair that a worker needs, sorted."""
        own = self._of_worker(rank, world)
        return np.sort(np.concatenate(self.lanes()[own.start : own.stop]))

    def epoch(self, epoch: int, rank: int, world: int) -> Iterator[BatchSlice]:
        """Yield a worker's batches of one epoch."""
        own, lanes = self._of_worker(rank, world), self.lanes()
        order = [np.random.default_rng(derive_seed(self.seed, epoch, lane)).permutation(lanes[lane]) for lane in own]
        for step in range(self.steps):
            global_rows = min(self.num_lanes, self.num_pairs - step * self.num_lanes)
            positions = [lane[step] for lane in order if step < len(lane)]
            first_row = min(own.start, global_rows)
            yield BatchSlice(np.array(positions, np.int64), first_row, global_rows)

    def _of_worker(self, rank: int, world: int) -> range:
        assert world <= self.num_lanes
        return range(rank * self.num_lanes // world, (rank + 1) * self.num_lanes // world)

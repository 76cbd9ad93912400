"""Mean training target of a store: read at once where it is small, else as partial sums in Ray Data tasks.

Shapes: B = pairs of a batch, D = target width, T = positions of a sequence.
"""

import functools
import operator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from ray_app.core.evaluation import TrainingMeans
from ray_app.data.pairs_dataset import ordered_pairs, to_arrays
from ray_app.errors import StoreError
from ray_app.store.pair_store import PairStore
from ray_app.store.split import Rows

SUM_ROWS = 256
"""Pairs that one Ray Data task sums."""
AT_ONCE_BYTES = 256 * 2**20
"""Pairs of at most so many bytes are read by this process: Ray Data takes 5 s to start."""


def mean_target(store: PairStore, train: Rows) -> Tensor:
    """Mean training target, shape (D,). StoreError if there is no training pair."""
    if not len(train):
        raise StoreError(f"{store.folder} has too few pairs: its train part is empty; prepare more.")
    return training_means(store, train).mean_target(store.feature("target").scale)


def training_means(store: PairStore, rows: Rows) -> TrainingMeans:
    """Sum the training targets of batches, and add the sums in the order of the store."""
    target = store.feature("target")
    if len(rows) * (store.feature("event").num_bytes + target.num_bytes) <= AT_ONCE_BYTES:
        target_ND = store.read_rows(rows)[1]
        batches = (target_ND[first : first + SUM_ROWS] for first in range(0, len(rows), SUM_ROWS))
        return functools.reduce(operator.add, (TrainingMeans.of(batch, target.token_width) for batch in batches))
    parts = ordered_pairs(store, rows).map_batches(
        functools.partial(_partial_sums, store), batch_size=SUM_ROWS, batch_format="pyarrow"
    )
    total = TrainingMeans(0, np.zeros(target.width))
    for batch in parts.iter_batches(batch_size=None, batch_format="numpy"):
        for n, pairs in enumerate(batch["pairs"]):
            tokens_T = np.asarray(batch["tokens"][n], np.int64) if target.token_width else None
            total += TrainingMeans(int(pairs), np.asarray(batch["target_sum"][n], np.float64), tokens_T)
    assert total.pairs == len(rows)
    return total


def _partial_sums(store: PairStore, batch: pa.Table) -> dict[str, NDArray[Any]]:
    """One row with the sums of a batch."""
    sums = TrainingMeans.of(to_arrays(batch, store)[2], store.feature("target").token_width)
    tokens = {} if sums.tokens_T is None else {"tokens": sums.tokens_T[None]}
    return {"pairs": np.array([sums.pairs]), "target_sum": sums.target_sum_D[None], **tokens}

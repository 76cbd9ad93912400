"""Pairs block by block as stored: read from a store's files in this process, cut at once, kept as tensors.

Shapes: B = pairs of a block, N = pairs kept, E, D = widths of the event and the target feature.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ray_app.data.pair_tensors import PairTensors
from ray_app.store.pair_store import PairStore, feature_matrix, open_part
from ray_app.store.split import Rows

Block = tuple[NDArray[np.int64], NDArray[Any], NDArray[Any]]
"""Positions in the store's canonical order (B,), events (B, E) and targets (B, D)."""


def read_blocks(store: PairStore, rows: Rows) -> Iterator[Block]:
    """Read these rows in this process, file by file, a row group at a time.

    One file as stored and one of its row groups are in memory. StoreError names a damaged file.
    """
    rows = np.asarray(rows, np.int64)
    for file in np.unique(store.index.file[rows]):
        yield from _blocks_of_file(store, int(file), rows[store.index.file[rows] == file])


def _blocks_of_file(store: PairStore, file: int, rows: NDArray[np.int64]) -> Iterator[Block]:
    row_in_file, first = store.index.row[rows], 0
    with open_part(store.folder, store.files[file]) as parquet:
        for group in range(parquet.num_row_groups):
            last = first + parquet.metadata.row_group(group).num_rows
            wanted = (first <= row_in_file) & (row_in_file < last)
            if wanted.any():
                table = parquet.read_row_group(group, ["event", "target"])
                table.validate(full=True)
                event_BE, target_BD = (
                    feature_matrix(table[side], store.feature(side))[row_in_file[wanted] - first]
                    for side in ("event", "target")
                )
                yield rows[wanted], event_BE, target_BD
            first = last


def load_pair_tensors(
    blocks: Iterable[Block],
    store: PairStore,
    rows: Rows,
    wanted: NDArray[np.int64],
    columns: tuple[slice, slice] = (slice(None), slice(None)),
) -> PairTensors:
    """Copy the pairs rows[wanted] out of blocks of `rows`; `wanted` is sorted.

    `columns`: those of the events and of the targets; no others are held.
    """
    sides = [store.feature(side) for side in ("event", "target")]
    widths = [len(range(*own.indices(side.width))) for side, own in zip(sides, columns, strict=True)]
    event_NE, target_ND = (
        torch.empty(len(wanted), width, dtype=getattr(torch, side.read_as))
        for side, width in zip(sides, widths, strict=True)
    )
    event, target = columns
    arrived = 0
    for position_B, events, targets in blocks:
        _, rows_B, into = np.intersect1d(position_B, rows[wanted], assume_unique=True, return_indices=True)
        event_NE.numpy()[into] = events[rows_B, event]
        target_ND.numpy()[into] = targets[rows_B, target]
        arrived += len(rows_B)
    assert arrived == len(wanted), f"{arrived} of {len(wanted)} pairs arrived"
    return PairTensors(wanted, event_NE, target_ND)

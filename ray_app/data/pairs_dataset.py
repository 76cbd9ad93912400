"""Pairs from a store through Ray Data: verified as they are read, held in memory or streamed.

Shapes: B = pairs of a block or batch, E, D = widths of the event and the target feature.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from ray.data import DataIterator, Dataset

from ray_app.core.adapters.seeded_noise import derive_seed
from ray_app.data.batch_order import BatchSlice
from ray_app.data.pair_blocks import Block
from ray_app.store.pair_store import PairStore, feature_matrix
from ray_app.store.split import Rows

SHUFFLE_ROWS = 512
"""Pairs that a streaming worker shuffles among: 154 MB at 150,528 wide."""


def pairs_dataset(store: PairStore, rows: Rows, *, read_cpus: float = 1.0) -> Dataset:
    """Read columns `position` (int64, in the store's canonical order), `event`, `target` of these rows.

    One block for each Parquet file that holds one of them; its SHA-256 and page checksums are verified as it is read,
    and StoreError names a damaged file. `read_cpus`: CPUs that reading a file claims; 0 if a lost node's pairs must
    be read again while workers have all CPUs.
    """
    rows = np.asarray(rows, np.int64)
    files = store.index.file[rows]
    work = [
        {"file": int(file), "row": store.index.row[of_file].tolist(), "position": of_file.tolist()}
        for file in np.unique(files)
        for of_file in (rows[files == file],)
    ]
    shared_store = ray.put(store)

    def read(item: dict[str, NDArray[Any]]) -> pa.Table:
        opened: PairStore = ray.get(shared_store)
        table = opened.table(int(item["file"][0])).select(["event", "target"])
        table = table.take(pa.array(np.asarray(item["row"][0], np.int64)))
        return table.add_column(0, "position", pa.array(np.asarray(item["position"][0], np.int64)))

    blocks = ray.data.from_items(work, override_num_blocks=len(work))
    return blocks.map_batches(read, batch_size=1, batch_format="numpy", num_cpus=read_cpus)


def ordered_pairs(store: PairStore, rows: Rows, *, read_cpus: float = 1.0) -> Dataset:
    """Read pairs in the order of the store's files; errors of the store are raised as themselves."""
    dataset = pairs_dataset(store, rows, read_cpus=read_cpus)
    dataset.context.execution_options.preserve_order = True
    dataset.context.raise_original_map_exception = True
    return dataset


def to_arrays(batch: pa.Table, store: PairStore) -> Block:
    """Return (positions (B,), events (B, E), targets (B, D)) as stored: read-only views of the batch."""
    return (
        batch["position"].to_numpy(),
        feature_matrix(batch["event"], store.feature("event")),
        feature_matrix(batch["target"], store.feature("target")),
    )


def dataset_blocks(dataset: DataIterator | Dataset, store: PairStore) -> Iterator[Block]:
    """Yield the blocks of a data set of pairs, a file each."""
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):  # type: ignore[arg-type]  # None: whole blocks
        yield to_arrays(batch, store)


def iter_batches(
    blocks: DataIterator, store: PairStore, seed: int, epoch: int, rank: int, world: int, batch_size: int
) -> Iterator[tuple[BatchSlice, torch.Tensor, torch.Tensor]]:
    """Yield a worker's batches of one epoch, read again and shuffled within a buffer."""
    local = batch_size // world
    batches = blocks.iter_batches(
        batch_size=local,
        batch_format="pyarrow",
        prefetch_batches=2,
        local_shuffle_buffer_size=max(SHUFFLE_ROWS, 2 * local),
        local_shuffle_seed=derive_seed(seed, epoch, rank) % 2**32,
    )
    for batch in batches:
        position_B, event_BE, target_BD = to_arrays(batch, store)
        batch_slice = BatchSlice(position_B, rank * len(position_B), world * len(position_B))
        yield batch_slice, torch.tensor(event_BE), torch.tensor(target_BD)

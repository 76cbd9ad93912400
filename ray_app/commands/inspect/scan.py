"""Scan a store in one pass through Ray Data: verify every file, and keep small measures of every pair.

Shapes: N = pairs of the store's index, in its order; K = numbers of a descriptor. Keeps about 1.2 kB for each pair.
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from rich.progress import Progress

from ray_app.core.image_similarity import CELLS, brightness, descriptors
from ray_app.core.metrics import cos_sim
from ray_app.events.render import drawn_shares
from ray_app.store.manifest import FeatureSpec
from ray_app.store.pair_store import FACT_COLUMNS, PairStore, feature_matrix
from ray_app.terminal import make_console

AT_A_TIME = 64
"""Pairs of a file that are measured at a time: 40 MB of pixels and brightness."""
BRIGHT = 0.9
"""Quantile of the brightness of a picture's cells that separates day from night: lamps are small, the sky is not."""

ScanColumn = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StoreScan:
    """Measures of each pair, in the index's order; NaN or empty where unknown or without meaning."""

    cosine: ScanColumn
    """cos_sim of the raw event feature with its target, shape (N,)."""
    event_hash: NDArray[np.str_]
    """BLAKE2b-128 of the event feature; empty where all of its numbers are the same."""
    target_hash: NDArray[np.str_]
    """BLAKE2b-128 of the target feature."""
    event_sketch: NDArray[np.float16]
    """Descriptor of the event picture, shape (N, K); zero if it is not a picture or blank."""
    target_sketch: NDArray[np.float16]
    """Descriptor of the target picture, shape (N, K)."""
    active: ScanColumn
    """Share of the drawn event image's pixels that have an event."""
    positive: ScanColumn
    """Positive share of these pixels."""
    bright: ScanColumn
    """Brightness, 0 to 255, that a tenth of the target picture's cells reach."""
    num_events: ScanColumn
    """Events of the window, counted by `prepare`."""
    num_drawn: ScanColumn
    """Events that were drawn, counted by `prepare`."""
    num_positive: ScanColumn
    """Positive events that were drawn, counted by `prepare`."""
    frame_offset_us: ScanColumn
    """Time of the target's frame minus that of the window's middle."""

    @staticmethod
    def joined(parts: list["StoreScan"]) -> "StoreScan":
        """Concatenate scans."""
        return StoreScan(
            **{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(StoreScan)}
        )


def is_picture(spec: FeatureSpec) -> bool:
    """True if a feature is a picture: three colours in bytes."""
    return spec.dtype == "uint8" and len(spec.shape) == 3 and spec.shape[0] == 3


def scan_store(store: PairStore) -> StoreScan:
    """Measure the pairs of the index, file by file, on the connected cluster. StoreError names a damaged file.

    Files with none of the pairs are verified too.
    """
    work = []
    for file in range(len(store.files)):
        of_file = np.flatnonzero(store.index.file == file)
        work.append({"file": file, "row": store.index.row[of_file].tolist(), "position": of_file.tolist()})
    store_ref = ray.put(store)

    def read(item: dict[str, NDArray[Any]]) -> Iterator[pa.Table]:
        opened: PairStore = ray.get(store_ref)
        table = opened.table(int(item["file"][0]))
        rows, positions = (np.asarray(item[name][0], np.int64) for name in ("row", "position"))
        for first in range(0, len(rows), AT_A_TIME):
            some = slice(first, first + AT_A_TIME)
            yield pa.table({"position": positions[some], **measure_pairs(opened, table.take(pa.array(rows[some])))})

    blocks = ray.data.from_items(work, override_num_blocks=len(work))
    batches = blocks.map_batches(read, batch_size=1, batch_format="numpy").iter_batches(
        batch_size=None, batch_format="pyarrow"
    )
    tables = []
    with Progress(console=make_console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("verify and measure", total=len(store.index))
        for batch in batches:
            tables += [batch] if len(batch) else []  # a file without any of the pairs
            bar.advance(task, len(batch))
    table = pa.concat_tables(tables).sort_by("position")
    assert np.array_equal(table["position"].to_numpy(), np.arange(len(store.index)))
    return StoreScan(**{f.name: _array(f.name, table[f.name]) for f in fields(StoreScan)})


def measure_pairs(store: PairStore, table: pa.Table) -> dict[str, pa.Array]:
    """Columns of a `StoreScan` for some rows of a file."""
    unknown = np.full(len(table), np.nan)
    columns: dict[str, Any] = dict.fromkeys(("cosine", "active", "positive", "bright"), unknown)
    side_ND = {side: feature_matrix(table[side], store.feature(side)) for side in ("event", "target")}
    for side, values_ND in side_ND.items():
        spec = store.feature(side)
        columns[f"{side}_hash"] = [_hash(row_D) for row_D in values_ND]
        sketch_NK = np.zeros((len(table), CELLS * CELLS), np.float16)
        if is_picture(spec):
            pictures_NCHW = values_ND.reshape(-1, *spec.shape)
            bright_NGG = brightness(pictures_NCHW)
            sketch_NK = descriptors(bright_NGG).astype(np.float16)
            if side == "event":
                columns["active"], columns["positive"] = drawn_shares(pictures_NCHW)
            else:
                columns["bright"] = np.quantile(bright_NGG, BRIGHT, axis=(1, 2)).astype(np.float64)
        columns[f"{side}_sketch"] = pa.array([row_K.tobytes() for row_K in sketch_NK], pa.binary(2 * CELLS * CELLS))
    event_ND, target_ND = side_ND["event"], side_ND["target"]
    if event_ND.shape == target_ND.shape:
        # Scales are positive and leave a cosine as it is.
        cosine = cos_sim(torch.tensor(event_ND).float(), torch.tensor(target_ND).float())
        columns["cosine"] = cosine.numpy().astype(np.float64)
    known = {
        name: table[name].cast(pa.float64()).to_numpy().astype(np.float64) if name in table.column_names else unknown
        for name in FACT_COLUMNS
    }
    middle_us = (table["t_start_us"].to_numpy() + table["t_end_us"].to_numpy()) / 2
    columns["frame_offset_us"] = known.pop("target_t_us") - middle_us
    return {
        name: column if isinstance(column, pa.Array) else pa.array(column)
        for name, column in {**columns, **known}.items()
    }


def _hash(row_D: NDArray[Any]) -> str:
    return "" if (row_D == row_D[0]).all() else hashlib.blake2b(row_D.tobytes(), digest_size=16).hexdigest()


def _array(name: str, column: pa.ChunkedArray) -> NDArray[Any]:
    if name.endswith("sketch"):
        return feature_matrix(column, FeatureSpec(dtype="float16", shape=(CELLS * CELLS,), scale=1.0))
    return column.to_numpy().astype(np.str_ if name.endswith("hash") else np.float64)

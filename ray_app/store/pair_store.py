"""Pairs in Parquet files: written part by part, published by a manifest, read only with their checksums.

Shapes: N = rows, D = numbers in one feature. Rows are named by their position in the canonical order: sorted
by (sequence, t_start_us, sample_id), which does not depend on files.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ray_app.errors import StoreError
from ray_app.store.atomic import sha256_bytes
from ray_app.store.filesystem import StorageDir, Where, open_storage
from ray_app.store.manifest import (
    MANIFEST,
    REJECTED,
    Features,
    FeatureSpec,
    FileRecord,
    Manifest,
    PartRecord,
    content_fingerprint,
)

ROW_GROUP = 32
"""Pairs that are compressed together: about 10 MB of pixels, so that a few rows are read cheaply."""
INDEX_COLUMNS = {
    "sample_id": pa.string(),
    "sequence": pa.string(),
    "t_start_us": pa.int64(),
    "t_end_us": pa.int64(),
}
FACT_COLUMNS = ("num_events", "num_drawn", "num_positive", "target_t_us")
"""Facts that a source may know of a window: int64, null where it does not. Older stores lack these columns."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One row of a store."""

    sequence: str
    """Name of the drive."""
    t_start_us: int
    """First microsecond of the window."""
    t_end_us: int
    """First microsecond after it."""
    event: bytes
    """Event feature, `FeatureSpec.num_bytes` long."""
    target: bytes
    """Target feature."""
    num_events: int | None = None
    """Events of the window, drawn or not; None where not known, as below."""
    num_drawn: int | None = None
    """Events that were drawn into the event image."""
    num_positive: int | None = None
    """Positive events among those that were drawn."""
    target_t_us: int | None = None
    """Time of the target's frame, in microseconds."""

    @property
    def sample_id(self) -> str:
        """BLAKE2b-128 of place, time and content, 32 hexadecimal digits: the same on every run."""
        place = f"{self.sequence}\0{self.t_start_us}\0{self.t_end_us}\0{len(self.event)}\0".encode()
        digest = hashlib.blake2b(place, digest_size=16)
        digest.update(self.event)
        digest.update(self.target)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class PairIndex:
    """All that is known of pairs but their features: arrays of length N, in canonical order."""

    sample_id: NDArray[np.str_]
    """Identity."""
    sequence: NDArray[np.str_]
    """Drive."""
    t_start_us: NDArray[np.int64]
    """Start of the window."""
    t_end_us: NDArray[np.int64]
    """End of the window."""
    duration: NDArray[np.str_]
    """Name of the window's length, such as `1s`."""
    file: NDArray[np.int64]
    """Position in the manifest's `files`."""
    row: NDArray[np.int64]
    """Row in that file."""

    def __len__(self) -> int:
        return len(self.sample_id)

    def take(self, rows: NDArray[Any]) -> "PairIndex":
        """Return the index of some rows, by positions or by a mask."""
        return PairIndex(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


@dataclass(frozen=True, slots=True)
class PairStore:
    """An opened store. Positions in `index` are what splits, readers and metrics call rows."""

    folder: StorageDir
    """Folder of the store."""
    manifest: Manifest
    """Manifest as read."""
    index: PairIndex
    """Its pairs, of the wanted durations."""

    @staticmethod
    def open(where: Where, durations: Sequence[str] = ()) -> "PairStore":
        """Read manifest and index, not the features. `durations` keeps these window lengths alone.

        StoreError: not a store, damaged, or a duration that it does not have.
        """
        folder = open_storage(where)
        manifest = Manifest.read(folder)
        verify_file(folder, manifest.rejected_file)  # small, and read by people alone
        if unknown := set(durations) - set(manifest.durations):
            has = ", ".join(manifest.durations)
            raise StoreError(f"{folder} has no windows of {', '.join(sorted(unknown))}; it has {has}.")
        tables = [read_index(folder, record) for record in manifest.files]
        index = _index(tables, manifest.durations)
        if content_fingerprint(index.sample_id, manifest.features) != manifest.fingerprint:
            PairStore(folder, manifest, index).verify()
            raise StoreError(f"{folder}: the pairs are not those of {MANIFEST}: another fingerprint.")
        if durations:
            index = index.take(np.isin(index.duration, list(durations)))
        return PairStore(folder, manifest, index)

    @property
    def files(self) -> tuple[PartRecord, ...]:
        """Parquet files, in the order that `index.file` counts."""
        return self.manifest.files

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the whole store, whatever durations are in use."""
        return self.manifest.fingerprint

    def feature(self, side: str) -> FeatureSpec:
        """Return the layout of the `event` or the `target` feature."""
        return {"event": self.manifest.features.event, "target": self.manifest.features.target}[side]

    def verify(self) -> None:
        """Every file against its SHA-256. StoreError names the first that differs or is missing."""
        for record in (*self.manifest.files, self.manifest.rejected_file):
            verify_file(self.folder, record)

    def table(self, file: int) -> pa.Table:
        """One Parquet file with all its columns, verified as it is read. StoreError names it if damaged."""
        record = self.files[file]
        return read_part(self.folder, record)

    def read_rows(self, rows: NDArray[np.int64] | Sequence[int]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Event and target features of these positions, in this order: two (N, D) arrays as stored.

        Reads every file that holds one of them: for small sets.
        """
        rows = np.asarray(rows, dtype=np.int64)
        event_ND, target_ND = (
            np.empty((len(rows), spec.width), spec.read_as)
            for spec in (self.feature("event"), self.feature("target"))
        )
        for file in np.unique(self.index.file[rows]):
            table = self.table(int(file))
            (into,) = np.nonzero(self.index.file[rows] == file)
            out_of = self.index.row[rows[into]]
            event_ND[into] = feature_matrix(table["event"], self.feature("event"))[out_of]
            target_ND[into] = feature_matrix(table["target"], self.feature("target"))[out_of]
        return event_ND, target_ND


def write_part(folder: Where, name: str, pairs: Sequence[Pair], features: Features) -> PartRecord:
    """Write one Parquet file at once or not at all; the same pairs give the same bytes.

    A feature of another length than `features` says raises ValueError; of a sequence, one that is too long, empty or
    no whole number of tokens raises StoreError.
    """
    for side, spec in (("event", features.event), ("target", features.target)):
        if spec.token_width:
            for pair in pairs:
                check_length(getattr(pair, side), spec, f"the {side} of {pair.sequence} at {pair.t_start_us} us")
    schema = pa.schema(
        [
            *(pa.field(name, kind, nullable=False) for name, kind in INDEX_COLUMNS.items()),
            pa.field("event", column_type(features.event), nullable=False),
            pa.field("target", column_type(features.target), nullable=False),
            *(pa.field(name, pa.int64()) for name in FACT_COLUMNS),
        ]
    )
    columns = [[getattr(pair, field.name) for pair in pairs] for field in schema]
    return write_table(open_storage(folder), name, pa.table(columns, schema=schema))


def column_type(spec: FeatureSpec) -> pa.DataType:
    """Return the type of a feature's column: bytes of one length, but for sequences."""
    return pa.binary() if spec.token_width else pa.binary(spec.num_bytes)


def check_length(feature: bytes, spec: FeatureSpec, what: str) -> None:
    """StoreError unless these are the bytes of 1 to `spec.shape[0]` tokens."""
    limit, width = spec.shape
    tokens, rest = divmod(len(feature), width * spec.item_bytes)
    if rest:
        raise StoreError(f"{what} has {len(feature)} bytes, no whole number of tokens of {width} × {spec.dtype}")
    if not 0 < tokens <= limit:
        raise StoreError(f"{what} has {tokens} tokens, the store's limit is {limit}: cut it, or raise the limit")


def write_table(folder: StorageDir, name: str, table: pa.Table) -> PartRecord:
    """Write a table that has the columns of a part."""
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        row_group_size=ROW_GROUP,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        store_schema=False,
        write_page_checksum=True,
    )
    data = buffer.getbuffer()
    folder.write(name, data)
    return PartRecord(name=name, bytes=len(data), sha256=sha256_bytes(data), pairs=table.num_rows)


def read_part(folder: StorageDir, record: PartRecord) -> pa.Table:
    """One Parquet file with all its columns. Its SHA-256 is taken of the very bytes that are decoded."""
    return _parse(folder.file(record.name), _verified(folder, record), None)


@contextmanager
def open_part(folder: StorageDir, record: PartRecord) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file, verified in the same way, to read it by row groups. StoreError names it if damaged."""
    with _opened(folder.file(record.name), _verified(folder, record)) as file:
        yield file


def _verified(folder: StorageDir, record: PartRecord) -> pa.BufferReader:
    path = folder.file(record.name)
    try:
        data = folder.read(record.name)
    except FileNotFoundError:
        raise _damaged(path, "the file is missing") from None
    if sha256_bytes(data) != record.sha256:
        raise _damaged(path, "its SHA-256 differs from the one it was written with")
    return pa.BufferReader(data)


def read_index(folder: StorageDir, record: PartRecord) -> pa.Table:
    """Return the columns of one Parquet file that are not features, under page checksums alone."""
    path = folder.file(record.name)
    try:
        table = _parse(path, folder.open(record.name), list(INDEX_COLUMNS))
    except FileNotFoundError:
        raise _damaged(path, "the file is missing") from None
    if table.num_rows != record.pairs:
        raise _damaged(path, f"{table.num_rows} rows instead of {record.pairs}")
    return table


def verify_file(folder: StorageDir, record: FileRecord) -> None:
    """StoreError unless the file has the bytes it was written with."""
    path = folder.file(record.name)
    try:
        if folder.sha256(record.name) != record.sha256:
            raise _damaged(path, "its SHA-256 differs from the one it was written with")
    except (FileNotFoundError, IsADirectoryError):
        raise _damaged(path, "the file is missing") from None


def feature_matrix(column: pa.ChunkedArray, spec: FeatureSpec) -> NDArray[Any]:
    """Return a binary column as an (N, D) array; a read-only view where it is one chunk of the stored size.

    Sequences have zeros behind their ends.
    """
    views = []
    for chunk in column.chunks:
        if spec.token_width:
            views.append(_padded(chunk, spec))
            continue
        flat = np.frombuffer(chunk.buffers()[1], np.uint8)
        first, last = chunk.offset * spec.num_bytes, (chunk.offset + len(chunk)) * spec.num_bytes
        views.append(_number_column(flat[first:last], spec).reshape(len(chunk), spec.width))
    return views[0] if len(views) == 1 else np.concatenate(views)


def _padded(chunk: pa.Array, spec: FeatureSpec) -> NDArray[Any]:
    """Sequences of one chunk, (N, D)."""
    offsets = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
    flat = np.frombuffer(chunk.buffers()[2], np.uint8)
    rows = np.zeros((len(chunk), spec.width), spec.read_as)
    for row, first, last in zip(rows, offsets[:-1], offsets[1:], strict=True):
        row[: (last - first) // spec.item_bytes] = _number_column(flat[first:last], spec)
    return rows


def _number_column(flat: NDArray[np.uint8], spec: FeatureSpec) -> NDArray[Any]:
    """Return stored bytes as numbers. bfloat16 is the upper half of a float32."""
    if spec.dtype != "bfloat16":
        return flat.view(np.dtype(spec.dtype).newbyteorder("<"))
    return (flat.view("<u2").astype(np.uint32) << 16).view(np.float32)


def publish(
    where: Where,
    parts: Iterable[PartRecord],
    *,
    features: Features,
    durations: dict[str, int],
    source: dict[str, Any],
    rejected: bytes,
) -> Manifest:
    """Write rejected.jsonl and, last, manifest.json: from then on the folder is a store.

    `durations` names window lengths in microseconds; those that occur go into the manifest.
    """
    folder = open_storage(where)
    parts = sorted(parts, key=lambda part: part.name)
    index = pa.concat_tables([read_index(folder, part) for part in parts])
    lengths_us = np.unique(index["t_end_us"].to_numpy() - index["t_start_us"].to_numpy()).tolist()
    folder.write(REJECTED, rejected)
    manifest = Manifest(
        pairs=index.num_rows,
        sequences=len(index["sequence"].unique()),
        rejected=rejected.count(b"\n"),
        durations={name: us for name, us in durations.items() if us in lengths_us},
        features=features,
        source=source,
        fingerprint=content_fingerprint(index["sample_id"].to_pylist(), features),
        files=tuple(parts),
        rejected_file=FileRecord(name=REJECTED, bytes=len(rejected), sha256=sha256_bytes(rejected)),
    ).sealed()
    manifest.write(folder)
    return manifest


def previous_window(index: PairIndex, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each of `rows` the place in `rows` of the window before it, shape (N,); −1 where there is none.

    Before: the nearest earlier start among `rows`, in the same sequence, at the same duration.
    """
    part = index.take(rows)
    order = np.lexsort((part.sample_id, part.t_start_us, part.duration, part.sequence))
    same = (part.sequence[order][1:] == part.sequence[order][:-1]) & (
        part.duration[order][1:] == part.duration[order][:-1]
    )
    same = np.concatenate(([False], same)) if len(order) else np.zeros(0, bool)
    starts = part.t_start_us[order]
    new_start = ~same | (np.diff(starts, prepend=starts[:1]) > 0)
    place = np.arange(len(order))
    first_of_start = np.maximum.accumulate(np.where(new_start, place, 0))
    found = same[first_of_start]  # a window with that start is not the first of its sequence and duration
    previous = np.full(len(order), -1, np.int64)
    previous[order] = np.where(found, order[first_of_start - 1], -1)
    return previous


def _index(tables: list[pa.Table], durations: dict[str, int]) -> PairIndex:
    file = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])
    row = np.concatenate([np.arange(table.num_rows) for table in tables])
    columns = {name: pa.concat_tables(tables)[name].to_numpy() for name in INDEX_COLUMNS}
    sample_id, sequence = columns["sample_id"].astype(np.str_), columns["sequence"].astype(np.str_)
    lengths_us = columns["t_end_us"] - columns["t_start_us"]
    duration = np.full(len(row), "", dtype=f"<U{max(map(len, durations))}")
    for name, us in durations.items():
        duration[lengths_us == us] = name
    order = np.lexsort((sample_id, columns["t_start_us"], sequence))
    return PairIndex(
        sample_id=sample_id[order],
        sequence=sequence[order],
        t_start_us=columns["t_start_us"][order],
        t_end_us=columns["t_end_us"][order],
        duration=duration[order],
        file=file[order],
        row=row[order],
    )


@contextmanager
def _opened(path: str, where: Any) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(where, page_checksum_verification=True) as file:
            yield file
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from error


def _parse(path: str, where: Any, columns: list[str] | None) -> pa.Table:
    with _opened(path, where) as file:
        table = file.read(columns)
        table.validate(full=True)
    if {name: table.schema.field(name).type for name in INDEX_COLUMNS if name in table.column_names} != INDEX_COLUMNS:
        raise _damaged(path, f"its columns are {', '.join(table.column_names)}")
    return table


def _damaged(path: str, what: str) -> StoreError:
    return StoreError(f"{path} is damaged: {what}. Prepare the store again, or copy the file again.")

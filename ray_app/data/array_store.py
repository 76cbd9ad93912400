"""A pair store from arrays or from a generator of pairs: features of any encoder, of any two widths.

Shapes: N = pairs, E, D = widths of event and target, T = tokens, W = token width, C, H, W = an image.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import InputError, StoreError
from ray_app.events.recording import LATEST_US
from ray_app.events.windows import format_duration, parse_duration
from ray_app.store.filesystem import StorageDir, Where, open_storage
from ray_app.store.manifest import (
    SCRATCH,
    Features,
    FeatureSpec,
    Manifest,
    PartRecord,
    RejectedLine,
    rejected_lines,
    require_claimable,
    require_few_rejected,
)
from ray_app.store.pair_store import Pair, publish, write_part

SCALES = {"uint8": 1 / 255, "float16": 1.0, "bfloat16": 1.0, "float32": 1.0}
"""Number types of a store with their scale: pixels of 0 to 255 are values of 0 to 1."""
SHAPES = {1: "(width,)", 2: "(tokens, width)", 3: "(channels, height, width)"}
PART_BYTES, PART_PAIRS = 32 * 2**20, 4096
"""Most bytes and most pairs of one Parquet file."""
MAX_DURATIONS = 16
"""Most window lengths of a store: reports name each of them."""
Feature = NDArray[Any]
Row = Mapping[str, Any]


def write_store(
    where: Where,
    pairs: Iterable[Row] | None = None,
    *,
    event: Sequence[Any] | Feature | None = None,
    target: Sequence[Any] | Feature | None = None,
    sequence: Sequence[Any] | Feature | str = "all",
    t_start_us: Sequence[int] | Feature | None = None,
    t_end_us: Sequence[int] | Feature | None = None,
    duration: str = "1s",
    source: Mapping[str, Any] | None = None,
    max_rejected_fraction: float = 0.0,
    progress: Callable[[int], None] = lambda _: None,
) -> Manifest:
    """Write a pair store from arrays, or from an iterable of pairs, and return its manifest.

    `event` (N, E) and `target` (N, D) are vectors, images of shape (N, C, H, W), or sequences: (N, T, W), or a list
    of arrays (T, W) of different lengths. Numbers are uint8 (pixels, whose values are 0 to 1), float16, float32, or
    float64, which is stored as float32. `sequence`: name of each pair's continuous recording, or one for all; a split
    never cuts one. `t_start_us`, `t_end_us`: each pair's window in microseconds; without them the pairs of a sequence
    follow each other, one `duration` after the other. `source` is kept in the manifest. `pairs` yields the same as
    dictionaries, `{"event": …, "target": …, "sequence": …, "t_start_us": …, "t_end_us": …}`; all but the first two
    may be missing. `progress` is called with the number of pairs so far.

    InputError: lengths, shapes or types that do not fit. StoreError: the folder holds something, or more than
    `max_rejected_fraction` of the pairs are unusable: a number that is not finite, all zeros, the same pair twice.
    """
    folder = open_storage(where)
    if (pairs is None) == (event is None or target is None):
        raise InputError("give both `event` and `target`, or `pairs`: an iterable of dictionaries with these keys")
    if pairs is None:
        columns = {"event": event, "target": target, "t_start_us": t_start_us, "t_end_us": t_end_us}
        pairs = rows_of({name: column for name, column in columns.items() if column is not None}, sequence)
    claim_folder(folder)
    for name in folder.listdir() - {SCRATCH}:  # of a start that was interrupted
        folder.delete(name)
    writer = ArrayWriter(folder, parse_duration(duration))
    for row in pairs:
        writer.add(row)
        progress(writer.rows)
    return writer.finish({"name": "arrays", "events": "unknown", **(source or {})}, max_rejected_fraction)


def rows_of(columns: Mapping[str, Any], sequence: Any) -> Iterator[Row]:
    """Yield the rows of arrays. InputError, at once: they differ in length, or their type cannot be stored."""
    columns = {name: as_numpy(column, name) for name, column in columns.items()}
    if not isinstance(sequence, str):
        columns["sequence"] = sequence
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} has {count:,}" for name, count in lengths.items())
        raise InputError(f"all arrays need one row for each pair, but {counts}")
    for side in ("event", "target"):
        if hasattr(columns[side], "dtype"):
            number_type(columns[side].dtype, side)
    rows = ({name: column[n] for name, column in columns.items()} for n in range(lengths["event"]))
    return rows if "sequence" in columns else ({**row, "sequence": sequence} for row in rows)


def as_numpy(column: Any, name: str) -> Any:
    """Return a tensor of torch as an array; all else as it is. InputError: numpy has no such numbers."""
    if not hasattr(column, "detach"):
        return column
    try:
        return column.detach().cpu().numpy()
    except TypeError as error:
        raise InputError(f"{name} holds {column.dtype}, which numpy does not have; convert it to float32") from error


def number_type(dtype: Any, side: str) -> str:
    """Return the type that numbers are stored in. InputError: none holds them."""
    name = "float32" if dtype == np.float64 else str(dtype)
    if name in SCALES:
        return name
    if name == "object":
        raise InputError(
            f"{side} is an array of Python objects (dtype object); give a list of arrays (tokens, width) for "
            "sequences of different lengths, else one array of numbers"
        )
    raise InputError(
        f"{side} holds {name}; convert it to uint8 (pixels of 0 to 255) or to float32 (features of an encoder)"
    )


def claim_folder(folder: StorageDir) -> None:
    """Make the folder ours. StoreError unless it is new, empty, or was left by a start that was interrupted."""
    if SCRATCH in require_claimable(folder) and "arrays" not in folder.listdir(SCRATCH):
        raise StoreError(f"{folder} holds another interrupted prepare; name a new or empty folder")
    folder.write(f"{SCRATCH}/arrays", b"")


@dataclass(slots=True)
class ArrayWriter:
    """Takes rows one by one and writes them in files; `finish` publishes the store."""

    folder: StorageDir
    """Folder of the store."""
    duration_us: int
    """Length of a window whose end is not given."""
    rows: int = 0
    """Rows so far, rejected ones included."""
    specs: dict[str, FeatureSpec] = field(default_factory=dict)
    """Layout of each side, by the rows so far: of sequences as many tokens as the longest."""
    rejected: list[RejectedLine] = field(default_factory=list)
    """Pairs that are not in the store."""
    parts: list[PartRecord] = field(default_factory=list)
    """Files so far."""
    _seen: set[str] = field(default_factory=set)
    _waiting: list[Pair] = field(default_factory=list)
    _next_start_us: dict[str, int] = field(default_factory=dict)
    _lengths_us: set[int] = field(default_factory=set)

    def add(self, row: Row) -> None:
        """Take a pair. InputError: it does not fit the rows before it."""
        number, self.rows = self.rows, self.rows + 1
        if missing := {"event", "target"} - set(row):
            raise InputError(f"row {number} has no {' and no '.join(sorted(missing))}")
        sequence = name_of(row.get("sequence", "all"), number)
        start_us, end_us = self._window(row, sequence, number)
        features = {side: self._feature(row[side], side, number) for side in ("event", "target")}
        pair = Pair(sequence, start_us, end_us, features["event"].tobytes(), features["target"].tobytes())
        reason = next(filter(None, (flaw(features[side], side) for side in features)), "")
        if reason or pair.sample_id in self._seen:
            reason = reason or "the same pair once more"
            self.rejected.append(RejectedLine(input=sequence, position=f"row {number}", reason=reason))
            return
        self._seen.add(pair.sample_id)
        self._lengths_us.add(end_us - start_us)
        self._waiting.append(pair)
        size = len(pair.event) + len(pair.target)
        if len(self._waiting) >= min(max(PART_BYTES // size, 1), PART_PAIRS):
            self._write()

    def finish(self, source: Mapping[str, Any], max_rejected_fraction: float) -> Manifest:
        """Publish the store. StoreError: no pair, or too many are rejected."""
        if not self.rows:
            raise InputError("there is no pair: the arrays are empty")
        require_few_rejected(self.folder, self.rejected, self.rows, max_rejected_fraction)
        self._write()
        manifest = publish(
            self.folder,
            self.parts,
            features=self._features(),
            durations={format_duration(us): us for us in sorted(self._lengths_us)},
            source=dict(source),
            rejected=rejected_lines(self.rejected),
        )
        self.folder.delete(SCRATCH)
        return manifest

    def _write(self) -> None:
        if self._waiting:
            name = f"arrays-{len(self.parts):05d}.parquet"
            self.parts.append(write_part(self.folder, name, self._waiting, self._features()))
            self._waiting = []

    def _features(self) -> Features:
        """Layout of both sides; two sequences have one limit, which the token adapters need."""
        limits = [spec.shape[0] for spec in self.specs.values() if spec.kind == "sequences"]
        return Features.model_validate(
            {
                side: spec.model_copy(update={"shape": (max(limits), spec.shape[1])})
                if spec.kind == "sequences"
                else spec
                for side, spec in self.specs.items()
            }
        )

    def _feature(self, value: Any, side: str, number: int) -> Feature:
        """Return one feature in the type it is stored in; a sequence without the zeros behind its end."""
        array = np.asarray(value)
        kind = number_type(array.dtype, side)
        stored = array if str(array.dtype) == kind else array.astype(kind)
        if stored.ndim not in SHAPES or not stored.size:
            raise InputError(
                f"row {number}: {side} has the shape {list(array.shape)}; a feature is one of "
                f"{', '.join(SHAPES.values())}"
            )
        if stored.ndim == 2:
            filled = np.flatnonzero(stored.any(axis=1))
            stored = stored[: filled[-1] + 1 if len(filled) else 1]
        known = self.specs.get(side)
        spec = FeatureSpec(dtype=str(stored.dtype), shape=stored.shape, scale=SCALES[str(stored.dtype)])
        if known is None:
            self.specs[side] = spec
        elif spec.dtype != known.dtype or spec.kind != known.kind or spec.shape[1:] != known.shape[1:]:
            raise self._other_layout(number, side, spec, known)
        elif spec.kind == "sequences":
            longest = max(spec.shape[0], known.shape[0])
            self.specs[side] = known.model_copy(update={"shape": (longest, known.shape[1])})
        elif spec.shape != known.shape:
            raise self._other_layout(number, side, spec, known)
        return np.ascontiguousarray(stored)

    def _other_layout(self, number: int, side: str, spec: FeatureSpec, known: FeatureSpec) -> InputError:
        return InputError(
            f"row {number}: {side} is {spec.dtype} of shape {list(spec.shape)}, those before it are {known.dtype} of "
            f"{list(known.shape)}; all rows of a side need one type and width (sequences may differ in length)"
        )

    def _window(self, row: Row, sequence: str, number: int) -> tuple[int, int]:
        """Start and end of a row's window in microseconds."""
        start_us = whole(row.get("t_start_us"), "t_start_us", number)
        if start_us is None:
            start_us = self._next_start_us.get(sequence, 0)
        end_us = whole(row.get("t_end_us"), "t_end_us", number) or start_us + self.duration_us
        if not 0 <= start_us < end_us < LATEST_US:
            raise InputError(
                f"row {number}: its window [{start_us}, {end_us}) must begin at 0 or later, end after that, and be "
                f"in microseconds, which reach {LATEST_US} in the year 5138; divide nanoseconds by 1000"
            )
        self._next_start_us[sequence] = end_us
        if len(self._lengths_us | {end_us - start_us}) > MAX_DURATIONS:
            raise InputError(
                f"row {number}: the windows have more than {MAX_DURATIONS} different lengths; leave t_end_us out, "
                "then all have the same"
            )
        return start_us, end_us


def flaw(feature: Feature, side: str) -> str:
    """Return the reason why a feature cannot be used, or an empty text."""
    if feature.dtype != np.uint8 and (bad := int(np.count_nonzero(~np.isfinite(feature)))):
        return f"the {side} has {bad} of {feature.size} numbers that are not finite"
    return "" if feature.any() else f"the {side} is all zeros, and a zero vector has no cosine"


def name_of(value: Any, number: int) -> str:
    """Return the name of a sequence as text. InputError: it is neither text nor a whole number."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str | int | np.integer) and str(value):
        return str(value)
    raise InputError(f"row {number}: a sequence is named by text or a whole number, not by {value!r}")


def whole(value: Any, name: str, number: int) -> int | None:
    """Return a time in microseconds. InputError: it is no whole number."""
    if value is None:
        return None
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    raise InputError(f"row {number}: {name} ({value!r}) must be a whole number of microseconds")

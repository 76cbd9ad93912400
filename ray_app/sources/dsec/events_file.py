"""events.h5 of DSEC: an index by milliseconds, and slices of events, without reading the rest of the file.

    events/{x,y,p,t}   t in microseconds since t_offset
    ms_to_idx          for each millisecond of the file's clock the first event at or after it
    t_offset           start of the file's clock; absent: 0

Times are whole microseconds of the common clock (with t_offset) everywhere outside this file.
"""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from ray_app.errors import InputError
from ray_app.events.recording import LATEST_US, Events
from ray_app.sources.dsec.hdf5 import require_whole

WIDTH, HEIGHT = 640, 480
"""Columns and rows of the event camera."""
EVENTS_AT_A_TIME = 2**18
"""Largest part of a slice in memory: some 6 MB while it is checked and drawn."""
CHUNK_CACHE_BYTES = 4 * 2**20
"""Size of the cache of each column: the chunk at the end of a part is not decompressed again for the next."""
COLUMNS = ("x", "y", "t", "p")
MAX_MS = 86_400_000
"""Most milliseconds of a recording."""


class DsecEvents:
    """An open events.h5. InputError, with the file's name, for whatever is wrong with it."""

    width, height = WIDTH, HEIGHT

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = h5py.File(path, "r", locking="best-effort", rdcc_nbytes=CHUNK_CACHE_BYTES)
        except OSError as error:
            raise InputError(f"{path} is truncated, damaged or no HDF5 file: {error}") from error
        try:
            self._columns = {name: self._column(f"events/{name}") for name in COLUMNS}
            self._check_form()
        except InputError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._count

    def index(self, t_us: int) -> int:
        """Return the number of events before `t_us`: the place of the first one at or after it.

        `ms_to_idx` gives the millisecond, and only its own times are read.
        """
        clock_us = t_us - self.t_offset_us
        ms = clock_us // 1000
        first, after = self._at_ms(ms), self._at_ms(ms + 1)
        low, high = max(first - 1, 0), min(after + 1, self._count)
        t = self._times(low, high)
        inside = t[first - low : after - low]
        if (
            (len(inside) and not ms * 1000 <= inside[0] <= inside[-1] < (ms + 1) * 1000)
            or (low < first and t[0] >= ms * 1000)
            or (after < high and t[-1] < (ms + 1) * 1000)
        ):
            raise InputError(
                f"{self.path}: ms_to_idx does not fit the times: by it millisecond {ms} is events {first} to "
                f"{after}, and those there have times from {t[0]} to {t[-1]} µs"
            )
        return first + int(np.searchsorted(inside, clock_us, side="left"))

    def time_us(self, place: int) -> int:
        """Time of one event."""
        return int(self._times(place, place + 1)[0]) + self.t_offset_us

    def parts(self, first: int, stop: int) -> Iterator[Events]:
        """Events [first, stop), checked, in parts that are small enough whatever the slice's length."""
        for a in range(first, stop, EVENTS_AT_A_TIME):
            b = min(a + EVENTS_AT_A_TIME, stop)
            x, y, p, t = (self._read(name, a, b) for name in ("x", "y", "p", "t"))
            t_us = self._signed("t", t) + self.t_offset_us
            yield Events.checked(x, y, t_us, p, WIDTH, HEIGHT, f"{self.path}, counted from event {a}")

    def silence(self, t_start_us: int, t_end_us: int, longest_us: int) -> tuple[int, int] | None:
        """Return the first stretch of [t_start_us, t_end_us) longer than `longest_us` without an event, exactly.

        `longest_us` is 2000 or more: a longer stretch holds a whole empty millisecond, so only the events next to
        empty milliseconds are read.
        """
        assert longest_us >= 2000
        first_ms = (t_start_us - self.t_offset_us) // 1000
        last_ms = (t_end_us - 1 - self.t_offset_us) // 1000
        starts = self._at_all_ms(first_ms, last_ms + 2)
        empty = np.concatenate([[False], np.diff(starts) == 0, [False]])
        begins, ends = np.flatnonzero(~empty[:-1] & empty[1:]), np.flatnonzero(empty[:-1] & ~empty[1:])
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            if end - begin < longest_us // 1000 - 1:
                continue
            after = int(starts[begin])
            low = max(t_start_us, self.time_us(after - 1)) if after else t_start_us
            high = min(t_end_us, self.time_us(after)) if after < self._count else t_end_us
            if high - low > longest_us:
                return low, high
        return None

    def _column(self, name: str) -> h5py.Dataset:
        """Return a dataset of whole numbers in one column, with its filter at hand."""
        try:
            dataset = self._file.get(name)
            if isinstance(dataset, h5py.Dataset):
                require_whole(dataset, self.path)
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise InputError(f"{self.path} is damaged: '{name}' cannot be found: {error}") from error
        if not isinstance(dataset, h5py.Dataset):
            why = "; the file is no events.h5 of DSEC, or was written incompletely"
            raise InputError(f"{self.path} has no '{name}'{why}")
        if dataset.ndim != 1 or not np.issubdtype(dataset.dtype, np.integer):
            raise InputError(
                f"{self.path}: '{name}' must be one column of whole numbers, it has shape {dataset.shape} and type "
                f"{dataset.dtype}"
            )
        return dataset

    def _check_form(self) -> None:
        """Check what needs no events: lengths, index, clock."""
        lengths = {name: len(column) for name, column in self._columns.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"{self.path}: the columns differ in length: {lengths}; is the file truncated?")
        self._count = lengths["t"]
        if not self._count:
            raise InputError(f"{self.path} holds no event")
        index = self._column("ms_to_idx")
        if len(index) > MAX_MS:  # before it is read: an index of zeros takes next to no bytes
            raise InputError(f"{self.path}: ms_to_idx has {len(index)} entries, the limit is {MAX_MS}: a day")
        self._ms = self._whole(index)
        wrong = self._ms[(self._ms < 0) | (self._ms > self._count)]
        if wrong.size or (np.diff(self._ms) < 0).any() or (self._ms.size and self._ms[0]):
            found = f"it holds {wrong[0]}" if wrong.size else "its values fall, or do not start at 0"
            raise InputError(f"{self.path}: ms_to_idx is damaged: {found}, and there are {self._count} events")
        self.t_offset_us = self._offset()
        first, last = (int(self._times(i, i + 1)[0]) for i in (0, self._count - 1))
        if last // 1000 >= len(self._ms):
            raise InputError(
                f"{self.path}: ms_to_idx covers {len(self._ms)} ms, but the last event is at {last} µs of the file's "
                "clock"
            )
        if first + self.t_offset_us < 0 or last + self.t_offset_us >= LATEST_US:
            raise InputError(
                f"{self.path}: with a t_offset of {self.t_offset_us} µs its times would go from "
                f"{first + self.t_offset_us} to {last + self.t_offset_us} µs; are they microseconds?"
            )

    def _offset(self) -> int:
        try:
            dataset = self._file.get("t_offset")
            if dataset is None:
                return 0
            shape, dtype = getattr(dataset, "shape", None), getattr(dataset, "dtype", np.dtype(np.void))
            if shape is None or prod(shape) != 1 or not np.issubdtype(dtype, np.integer):
                raise InputError(
                    f"{self.path}: t_offset must be one whole number, it has shape {shape} and type {dtype}"
                )
            require_whole(dataset, self.path)
            return int(np.asarray(dataset[()]).reshape(-1)[0])
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"{self.path} is damaged: t_offset cannot be read: {error}") from error

    def _at_ms(self, ms: int) -> int:
        return int(self._at_all_ms(ms, ms + 1)[0])

    def _at_all_ms(self, first_ms: int, stop_ms: int) -> NDArray[np.int64]:
        """Places of the first events at or after each millisecond; 0 before the clock starts, all after its end."""
        ms = np.arange(first_ms, stop_ms)
        known = self._ms[np.clip(ms, 0, len(self._ms) - 1)]
        return np.where(ms < 0, 0, np.where(ms >= len(self._ms), self._count, known))

    def _times(self, first: int, stop: int) -> NDArray[np.int64]:
        """Return times by the file's clock, wide enough to add t_offset. InputError: not in order."""
        t = self._signed("t", self._read("t", first, stop))
        backwards = np.flatnonzero(np.diff(t) < 0)
        if backwards.size:
            i = int(backwards[0]) + 1
            raise InputError(
                f"{self.path}: times run backwards at event {first + i}: {t[i - 1]} µs, then {t[i]} µs of the file's "
                "clock; sort the recording by time"
            )
        return t

    def _read(self, name: str, first: int, stop: int) -> NDArray[Any]:
        try:
            return self._columns[name][first:stop]
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{self.path} is damaged: 'events/{name}' cannot be read from {first} to {stop}: {error}"
            ) from error

    def _whole(self, dataset: h5py.Dataset) -> NDArray[np.int64]:
        try:
            return self._signed("ms_to_idx", dataset[()])
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"{self.path} is damaged: '{dataset.name}' cannot be read: {error}") from error

    def _signed(self, name: str, values: NDArray[Any]) -> NDArray[np.int64]:
        """Return a copy as int64. InputError: a value above 2^63."""
        if values.dtype == np.uint64 and len(values) and (largest := values.max()) >= 2**63:
            raise InputError(f"{self.path}: '{name}' holds {largest}, which is above 2^63")
        return values.astype(np.int64)

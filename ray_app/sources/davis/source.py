"""DAVIS: recordings of sensors whose pixels give events and frames at once (`.aedat4`).

Both sides show the same view, so they are true pairs without alignment: the event image is drawn on the sensor's own
geometry, and squeezed as its frames are. Windows and their pairs are those of sources/recorded.py; a frame's time is
the middle of its exposure, by the clock of the events.

A file can be decoded from its beginning alone (aedat4.py). A worker's reader is left open where its last task
ended, so that tasks in order decode a file once for each worker, for all durations, and not once each. What was
decoded of a window is on disk until it is drawn (spool.py): memory holds one packet of it, and a note of
each, whatever its length.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import InputError
from ray_app.events.recording import Events
from ray_app.events.windows import Window
from ray_app.sources.base import RawPair, RejectedPair, SourceTask, file_identity, named_sequences, require_visible
from ray_app.sources.davis.aedat4 import Aedat4, RecordedFrame, frame_span
from ray_app.sources.davis.spool import Spool, Spooled
from ray_app.sources.recorded import WindowingConfig, by_start


@dataclass(frozen=True)
class DavisSource:
    """Windows of every recording, from its first frame's time on, at each duration."""

    files: tuple[Path, ...]
    """Recordings (.aedat4)."""
    cut: WindowingConfig
    """Window lengths, and what of them is drawn."""

    name = "davis"

    def describe(self) -> dict[str, Any]:
        return {
            "recordings": [{"sequence": name, **file_identity(path)} for name, path in named_sequences(self.files)],
            "align": "same pixels",
            **self.cut.describe(),
        }

    def durations(self) -> list[str]:
        return self.cut.names()

    def tasks(self) -> list[SourceTask]:
        """Up to 64 pairs and 64 s of windows of one recording each, of all durations; files are decoded once for it.

        InputError: a recording that is truncated, damaged or of another kind, or no window of a duration anywhere.
        """
        tasks: list[SourceTask] = []
        for number, (name, path) in enumerate(named_sequences(self.files)):
            portions = self.cut.portions(*frame_span(path), by_start)
            tasks += [self.cut.task(name, part, windows, {"file": number}) for part, windows in enumerate(portions)]
        if length := self.cut.without_windows(tasks):
            raise InputError(
                f"no recording has frames over {length}, the length of a window; take shorter --durations"
            )
        return sorted(tasks, key=lambda task: task.name)

    def pairs(self, task: SourceTask) -> Iterator[RawPair | RejectedPair]:
        """Yield the task's pairs in order of their windows; one that cannot be built costs its own pairs alone."""
        name, path = named_sequences(self.files)[task.spec["file"]]
        require_visible(path)
        windows = [Window(*ends) for ends in task.spec["windows"]]
        reader = _reader(path, windows[0].t_start_us)
        for window in windows:
            excerpt = reader.excerpt(window)
            yield from self.cut.pairs(name, excerpt, excerpt.frames_us, [window], excerpt.sides)


@dataclass(frozen=True, slots=True)
class Packet:
    """Events that were decoded together, on disk."""

    first: int
    """Place of the first of them in the recording."""
    stop: int
    """Place after the last."""
    first_us: int
    """Time of the first."""
    last_us: int
    """Time of the last."""
    columns: tuple[Spooled, Spooled, Spooled, Spooled]
    """x, y, t_us and p, as in Events."""

    def times_us(self) -> NDArray[np.int64]:
        return self.columns[2].read()


@dataclass(frozen=True, slots=True)
class EventSpan:
    """Events and frames around one window, on disk; see RecordedEvents."""

    width: int
    """Sensor columns."""
    height: int
    """Sensor rows."""
    packets: list[Packet]
    """Frames in order of time."""
    stop: int
    """Place after the last event."""
    frames_us: NDArray[np.int64]
    """Times of the frames, rising."""
    frames: list[RecordedFrame]
    """Columns as decoded, but for `pixels`, which are Spooled."""

    def index(self, t_us: int) -> int:
        place = bisect_left(self.packets, t_us, key=lambda packet: packet.last_us)
        if place == len(self.packets):
            return self.stop
        return self.packets[place].first + int(np.searchsorted(self.packets[place].times_us(), t_us))

    def parts(self, first: int, stop: int) -> Iterator[Events]:
        for packet in self.packets:
            if packet.first < stop and packet.stop > first:
                x, y, t_us, p = (column.read() for column in packet.columns)
                events = Events(x, y, t_us, p, self.width, self.height)
                yield events[max(first - packet.first, 0) : stop - packet.first]

    def silence(self, t_start_us: int, t_end_us: int, longest_us: int) -> tuple[int, int] | None:
        before_us = t_start_us
        for packet in self.packets:
            if packet.last_us < t_start_us or packet.first_us >= t_end_us:
                continue
            t_us = packet.times_us()
            inside = t_us[slice(*np.searchsorted(t_us, (t_start_us, t_end_us)))]
            if found := _first_gap(np.concatenate([[before_us], inside]), longest_us):
                return found
            before_us = int(inside[-1]) if len(inside) else before_us
        return _first_gap(np.array([before_us, t_end_us]), longest_us)

    def sides(self, drawn: NDArray[np.uint8], number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Both pictures of a pair. InputError: see frame."""
        return drawn, self.frame(number)

    def frame(self, number: int) -> NDArray[np.uint8]:
        """(H, W, 3) RGB; grey becomes three equal channels. InputError: not the whole sensor, or another format."""
        found = self.frames[number]
        width, height = found["width"], found["height"]
        if (found["offset_x"], found["offset_y"], width, height) != (0, 0, self.width, self.height):
            raise InputError(
                f"the frame shows {width} x {height} pixels from ({found['offset_x']}, {found['offset_y']}) on; a "
                f"pair needs the sensor's whole {self.width} x {self.height}"
            )
        pixels = found["pixels"].read()
        if pixels.dtype != np.uint8 or found["format"] not in ("L", "RGB", "RGBA"):
            raise InputError(f"the frame has the format {found['format']}; it must be L, RGB or RGBA of 8 bits")
        if found["format"] == "L":
            return np.repeat(pixels.reshape(height, width, 1), 3, axis=2)
        return np.ascontiguousarray(pixels[..., :3])


class Reader:
    """Spans of one file for windows in order of time: reads forwards only, and forgets what is behind."""

    def __init__(self, path: Path) -> None:
        self._file = Aedat4(path)
        self._packets = iter(self._file)
        self._ended = False
        self._spool = Spool()
        self._events: list[Packet] = []
        self._frames: list[tuple[int, RecordedFrame]] = []
        self.forgotten_until_us = -(2**63)
        """Start of the last window; earlier ones cannot be had any more."""

    def excerpt(self, window: Window) -> EventSpan:
        """All events and frames of a window that starts no earlier than the one before."""
        assert window.t_start_us >= self.forgotten_until_us
        self.forgotten_until_us = window.t_start_us
        try:
            self._read_until(window)
        except InputError:
            self.forgotten_until_us = 2**63  # an interrupted read is not continued
            raise
        self._events = [packet for packet in self._events if packet.last_us >= window.t_start_us]
        self._frames = [frame for frame in self._frames if frame[0] >= window.t_start_us]
        return EventSpan(
            self._file.width,
            self._file.height,
            list(self._events),
            self._file.num_events,
            np.array([t_us for t_us, _ in self._frames], np.int64),
            [frame for _, frame in self._frames],
        )

    def _read_until(self, window: Window) -> None:
        """Packets, until one of each kind reaches the window's end: the two streams are interleaved only roughly."""
        while not self._ended and min(self._file.events_until_us, self._file.frames_until_us) < window.t_end_us:
            packet = next(self._packets, None)
            if packet is None:
                self._ended = True
            elif not isinstance(packet, Events):
                t_us, frame = packet
                if t_us >= window.t_start_us:
                    self._frames.append((t_us, frame | {"pixels": self._spool.put(frame["pixels"])}))
            elif packet.t_us[-1] >= window.t_start_us:
                self._events.append(self._kept(packet))

    def _kept(self, events: Events) -> Packet:
        stop, (first_us, last_us) = self._file.num_events, events.t_us[[0, -1]].tolist()
        x, y, t_us, p = (self._spool.put(column) for column in (events.x, events.y, events.t_us, events.p))
        return Packet(stop - len(events), stop, first_us, last_us, (x, y, t_us, p))


def _first_gap(t_us: NDArray[np.int64], longest_us: int) -> tuple[int, int] | None:
    places = np.flatnonzero(np.diff(t_us) > longest_us)[:1].tolist()
    return next(((int(t_us[i]), int(t_us[i + 1])) for i in places), None)


_LEFT_OPEN: dict[Path, tuple[tuple[int, int], Reader]] = {}
"""The reader that this process used last, with the size and time of its file."""


def _reader(path: Path, t_us: int) -> Reader:
    """One that can give windows from `t_us` on."""
    status = path.stat()
    version = (status.st_size, status.st_mtime_ns)
    known, reader = _LEFT_OPEN.get(path, (None, None))
    if reader is None or known != version or reader.forgotten_until_us > t_us:
        reader = Reader(path)
    _LEFT_OPEN.clear()
    _LEFT_OPEN[path] = (version, reader)
    return reader

"""DAVIS: recordings of sensors whose pixels give events and frames at once (`.aedat4`).

Both sides show the same view, so they are true pairs without alignment: the event image is drawn on the sensor's own
geometry, and squeezed as its frames are. Windows and their pairs are those of sources/recorded.py; a frame's time is
the middle of its exposure, by the clock of the events.

A file can be decoded from its beginning alone (sources/aedat4.py). A worker's reader is left open where its last task
ended, so that tasks in order decode a file once for each worker, and not once each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import InputError
from ray_app.events.recording import Events
from ray_app.events.windows import Window, format_duration
from ray_app.sources.aedat4 import Aedat4, Frame, frame_span
from ray_app.sources.base import RawPair, Rejected, SourceTask, file_identity, named_sequences, require_here
from ray_app.sources.recorded import Cut, file_name, first_gap


@dataclass(frozen=True)
class DavisSource:
    """Windows of every recording, from its first frame's time on, at each duration."""

    files: tuple[Path, ...]
    """Recordings (.aedat4)."""
    cut: Cut
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
        """Up to 64 pairs and 64 s of one recording and duration each; every file is decoded once for it.

        InputError: a recording that is truncated, damaged or of another kind, or no window of a duration anywhere.
        """
        tasks: list[SourceTask] = []
        for number, (name, path) in enumerate(named_sequences(self.files)):
            first_us, last_us = frame_span(path)
            for duration_us in self.cut.durations_us:
                for part, starts_us in enumerate(self.cut.portions(first_us, last_us, duration_us)):
                    spec = {"file": number, "duration_us": duration_us, "starts_us": starts_us}
                    task = f"{file_name(name)}-{format_duration(duration_us)}-{part:05d}"
                    tasks.append(SourceTask(task, len(starts_us) * self.cut.pairs_per_window, spec))
        for duration_us in self.cut.durations_us:
            if not any(task.spec["duration_us"] == duration_us for task in tasks):
                raise InputError(
                    f"no recording has frames over {format_duration(duration_us)}, the length of a window; take "
                    "shorter --durations"
                )
        return sorted(tasks, key=lambda task: task.name)

    def pairs(self, task: SourceTask) -> Iterator[RawPair | Rejected]:
        """The task's pairs in order of time; a window that cannot be built costs its own pairs alone."""
        spec = task.spec
        name, path = named_sequences(self.files)[spec["file"]]
        require_here(path)
        reader = _reader(path, spec["starts_us"][0])
        for start_us in spec["starts_us"]:
            window = Window(start_us, start_us + spec["duration_us"])
            yield from self.cut.with_rejections(name, window, self._pairs(name, reader.excerpt(window), window))

    def _pairs(self, name: str, excerpt: "Excerpt", window: Window) -> Iterator[RawPair]:
        for event_HWC, number, told in self.cut.drawn(excerpt, excerpt.frames_us, window):
            yield RawPair(name, window.t_start_us, window.t_end_us, event_HWC, excerpt.frame(number), **told)


@dataclass(frozen=True, slots=True)
class Excerpt:
    """Events and frames around one window, in memory."""

    events: Events
    """In order of time."""
    frames_us: NDArray[np.int64]
    """Times of the frames, rising."""
    frames: list[Frame]
    """As they were decoded."""

    @property
    def width(self) -> int:
        return self.events.width

    @property
    def height(self) -> int:
        return self.events.height

    def index(self, t_us: int) -> int:
        return int(np.searchsorted(self.events.t_us, t_us))

    def time_us(self, place: int) -> int:
        return int(self.events.t_us[place])

    def parts(self, first: int, stop: int) -> Iterator[Events]:
        yield self.events[first:stop]

    def silence(self, t_start_us: int, t_end_us: int, longest_us: int) -> tuple[int, int] | None:
        t_us = np.concatenate([[t_start_us], self.events.between(t_start_us, t_end_us).t_us, [t_end_us]])
        places = np.flatnonzero(np.diff(t_us) > longest_us)[:1].tolist()
        return next((first_gap(t_us[i : i + 2].tolist(), longest_us) for i in places), None)

    def frame(self, number: int) -> NDArray[np.uint8]:
        """(H, W, 3) RGB; grey becomes three equal channels. InputError: not the whole sensor, or another format."""
        found = self.frames[number]
        width, height = found["width"], found["height"]
        if (found["offset_x"], found["offset_y"], width, height) != (0, 0, self.width, self.height):
            raise InputError(
                f"the frame shows {width} x {height} pixels from ({found['offset_x']}, {found['offset_y']}) on; a "
                f"pair needs the sensor's whole {self.width} x {self.height}"
            )
        pixels = found["pixels"]
        if pixels.dtype != np.uint8 or found["format"] not in ("L", "RGB", "RGBA"):
            raise InputError(f"the frame has the format {found['format']}; it must be L, RGB or RGBA of 8 bits")
        if found["format"] == "L":
            return np.repeat(pixels.reshape(height, width, 1), 3, axis=2)
        return np.ascontiguousarray(pixels[..., :3])


class Reader:
    """Excerpts of one file for windows in order of time: it goes forwards only, and forgets what lies behind."""

    def __init__(self, path: Path) -> None:
        self._file = Aedat4(path)
        self._packets = iter(self._file)
        self._ended = False
        self._events: list[Events] = []
        self._frames: list[tuple[int, Frame]] = []
        self.forgotten_until_us = -(2**63)
        """Start of the last window; earlier ones cannot be had any more."""

    def excerpt(self, window: Window) -> Excerpt:
        """All events and frames of a window that starts no earlier than the one before."""
        assert window.t_start_us >= self.forgotten_until_us
        self.forgotten_until_us = window.t_start_us
        try:
            self._read_until(window.t_end_us)
        except InputError:
            self.forgotten_until_us = 2**63  # what breaks off is not gone on with
            raise
        self._events = [part for part in self._events if part.t_us[-1] >= window.t_start_us]
        self._frames = [frame for frame in self._frames if frame[0] >= window.t_start_us]
        parts = [part for part in self._events if part.t_us[0] < window.t_end_us]
        return Excerpt(
            self._joined(parts),
            np.array([t_us for t_us, _ in self._frames], np.int64),
            [frame for _, frame in self._frames],
        )

    def _read_until(self, t_us: int) -> None:
        """Packets, until one of each kind reaches `t_us`: the two streams are interleaved only roughly."""
        while not self._ended and min(self._file.events_until_us, self._file.frames_until_us) < t_us:
            packet = next(self._packets, None)
            if packet is None:
                self._ended = True
            elif isinstance(packet, Events):
                self._events.append(packet)
            else:
                self._frames.append(packet)

    def _joined(self, parts: list[Events]) -> Events:
        def column(name: str, dtype: type) -> NDArray[Any]:
            return np.concatenate([np.zeros(0, dtype), *(getattr(part, name) for part in parts)])

        return Events(
            column("x", np.uint16),
            column("y", np.uint16),
            column("t_us", np.int64),
            column("p", np.uint8),
            self._file.width,
            self._file.height,
        )


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

"""Windows of recordings that hold events and frames: where they lie, which events are drawn, which frame belongs.

A window's events are divided into `num_images` parts of equal count and drawn as EventGPT draws them. As in the
reference, the middle part and the middle frame make the window's pair (`pick: middle`); or each part makes one,
with the frame of the window that is nearest in time to the part's middle (`pick: all`).
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import ConfigError, InputError
from ray_app.events.recording import Events
from ray_app.events.render import Drawing
from ray_app.events.windows import Window, format_duration, windows_between
from ray_app.sources.base import RawPair, Rejected

SHORTEST_US, LONGEST_US = 50_000, 20_000_000
"""Range of a window's length."""
SHORTEST_GAP_US = 2_000
"""Shortest silence that can be asked for: DSEC's index counts in milliseconds."""
SHORTEST_STEP_US = 1_000
PAIRS_PER_TASK = 64
SECONDS_PER_TASK_US = 64_000_000
"""Most recorded time whose windows one task draws: long windows are few to a task."""

Pick = Literal["middle", "all"]


class RecordedEvents(Protocol):
    """Events of one sensor by their places in order of time; times are microseconds of the recording's clock."""

    @property
    def width(self) -> int:
        """Sensor columns."""
        ...

    @property
    def height(self) -> int:
        """Sensor rows."""
        ...

    def index(self, t_us: int) -> int:
        """How many events come before `t_us`."""
        ...

    def time_us(self, place: int) -> int:
        """Time of one event."""
        ...

    def parts(self, first: int, stop: int) -> Iterator[Events]:
        """Events [first, stop) in parts that are small enough to hold."""
        ...

    def silence(self, t_start_us: int, t_end_us: int, longest_us: int) -> tuple[int, int] | None:
        """The first stretch of [t_start_us, t_end_us) longer than `longest_us` without an event."""
        ...


@dataclass(frozen=True)
class Cut:
    """How recordings become pairs, whatever their format."""

    durations_us: tuple[int, ...]
    """Window lengths."""
    step_us: int | None = None
    """Distance between window starts; None: half of each duration."""
    pick: Pick = "middle"
    """The middle event image of a window, or all of them."""
    num_images: int = 5
    """Event images of a window, by equal count."""
    max_gap_us: int = 200_000
    """Longest time in a window without an event, or without a frame."""
    event_slice_us: int | None = None
    """Events are taken from this length in the middle of the window; None: from all of it."""

    def __post_init__(self) -> None:
        """ConfigError: settings that do not fit together."""
        if not self.durations_us:
            raise ConfigError("--durations names no window length; give one or several, such as 1s")
        for duration_us in self.durations_us:
            name = format_duration(duration_us)
            if not SHORTEST_US <= duration_us <= LONGEST_US:
                raise ConfigError(f"--durations ({name}) must lie between 50ms and 20s")
            if self.event_slice_us is not None and self.event_slice_us > duration_us:
                raise ConfigError(
                    f"--event-slice ({format_duration(self.event_slice_us)}) is longer than the window ({name}) that "
                    "it is the middle of"
                )
        if twice := [us for us, count in Counter(self.durations_us).items() if count > 1]:
            raise ConfigError(f"--durations names {format_duration(twice[0])} twice")
        if self.step_us is not None and self.step_us < SHORTEST_STEP_US:
            raise ConfigError(f"--step ({format_duration(self.step_us)}) must be 1ms or more")
        if self.max_gap_us < SHORTEST_GAP_US:
            raise ConfigError(f"--max-gap ({format_duration(self.max_gap_us)}) must be 2ms or more")
        if not 1 <= self.num_images <= PAIRS_PER_TASK:
            raise ConfigError(f"--num-images ({self.num_images}) must lie between 1 and {PAIRS_PER_TASK}")

    @property
    def pairs_per_window(self) -> int:
        return self.num_images if self.pick == "all" else 1

    def names(self) -> list[str]:
        """The durations by name."""
        return [format_duration(duration_us) for duration_us in self.durations_us]

    def describe(self) -> dict[str, Any]:
        """Every setting, and in words what is drawn."""
        part = "the middle one" if self.pick == "middle" else "each"
        frame = "the middle frame" if self.pick == "middle" else "the frame nearest to the image's middle in time"
        return {
            "durations": self.names(),
            "steps": [format_duration(self._step(duration_us)) for duration_us in self.durations_us],
            "pick": self.pick,
            "num_images": self.num_images,
            "max_gap": format_duration(self.max_gap_us),
            "event_slice": format_duration(self.event_slice_us) if self.event_slice_us else None,
            "events": "recorded",
            "event_image": f"{part} of {self.num_images} of equal event count",
            "target": f"{frame} of the window",
        }

    def portions(self, first_us: int, last_us: int, duration_us: int) -> list[list[int]]:
        """Starts of the windows between the first and the last frame, as many at a time as one task draws."""
        windows = windows_between(first_us, last_us, duration_us, self._step(duration_us))
        starts_us = [window.t_start_us for window in windows]
        size = max(min(PAIRS_PER_TASK // self.pairs_per_window, SECONDS_PER_TASK_US // duration_us), 1)
        return [starts_us[first : first + size] for first in range(0, len(starts_us), size)]

    def drawn(
        self, events: RecordedEvents, times_us: NDArray[np.int64], window: Window
    ) -> Iterator[tuple[NDArray[np.uint8], int, dict[str, int]]]:
        """(event image, number of its frame, what a RawPair tells of it) for each pair of a window; `times_us` are
        those of the frames.

        InputError: too few events, no frame, or a gap.
        """
        first_frame, after_frames = np.searchsorted(times_us, (window.t_start_us, window.t_end_us)).tolist()
        frames = np.arange(first_frame, after_frames)
        self._check_gaps(events, times_us[frames], window)
        bounds = self._bounds(events, window)
        num_events = bounds[-1] - bounds[0]
        if self.event_slice_us is not None:
            num_events = events.index(window.t_end_us) - events.index(window.t_start_us)
        for i in range(self.num_images) if self.pick == "all" else [self.num_images // 2]:
            number = int(frames[len(frames) // 2])
            if self.pick == "all":
                middle_us = (events.time_us(bounds[i]) + events.time_us(bounds[i + 1] - 1)) / 2
                number = int(frames[np.argmin(np.abs(times_us[frames] - middle_us))])
            positives: list[int] = []
            parts = _counted(events.parts(bounds[i], bounds[i + 1]), positives)
            image_HWC = painted(parts, events.width, events.height)
            yield (
                image_HWC,
                number,
                {
                    "num_events": num_events,
                    "num_drawn": bounds[i + 1] - bounds[i],
                    "num_positive": sum(positives),
                    "target_t_us": int(times_us[number]),
                },
            )

    def with_rejections(self, name: str, window: Window, pairs: Iterator[RawPair]) -> Iterator[RawPair | Rejected]:
        """A window's pairs; where they break off with an InputError, each that is missing as Rejected."""
        done = 0
        try:
            for pair in pairs:
                yield pair
                done += 1
        except InputError as error:
            where = f"window [{window.t_start_us}, {window.t_end_us})"
            for i in range(done, self.pairs_per_window):
                yield Rejected(name, where if self.pairs_per_window == 1 else f"{where}, image {i}", str(error))

    def _step(self, duration_us: int) -> int:
        return self.step_us or duration_us // 2

    def _check_gaps(self, events: RecordedEvents, frames_us: NDArray[np.int64], window: Window) -> None:
        start_us, end_us = window.t_start_us, window.t_end_us
        if not len(frames_us):
            raise InputError("no frame was taken in the window")
        silences = [("event", events.silence(start_us, end_us, self.max_gap_us))]
        silences.append(("frame", first_gap([start_us, *frames_us.tolist(), end_us], self.max_gap_us)))
        for what, gap in silences:
            if gap:
                raise InputError(
                    f"no {what} for {(gap[1] - gap[0]) / 1000:.3f} ms from {gap[0]} µs on; --max-gap allows "
                    f"{format_duration(self.max_gap_us)}"
                )

    def _bounds(self, events: RecordedEvents, window: Window) -> list[int]:
        """Places at which the window's event images begin and end: parts of equal count, the last with the rest."""
        start_us, end_us = window.t_start_us, window.t_end_us
        if self.event_slice_us is not None:
            start_us += (end_us - start_us - self.event_slice_us) // 2
            end_us = start_us + self.event_slice_us
        first, stop = events.index(start_us), events.index(end_us)
        if stop - first < self.num_images:
            raise InputError(
                f"{stop - first} events cannot be drawn as {self.num_images} images; at least one each is needed"
            )
        count = (stop - first) // self.num_images
        return [*(first + i * count for i in range(self.num_images)), stop]


def first_gap(times_us: Iterable[int], longest_us: int) -> tuple[int, int] | None:
    """The first two neighbours that are further apart than `longest_us`."""
    return next(((a, b) for a, b in pairwise(times_us) if b - a > longest_us), None)


def painted(parts: Iterable[Events], width: int, height: int) -> NDArray[np.uint8]:
    """The event image of parts that follow each other in time: the last event at a pixel wins, over parts too."""
    drawing = Drawing(width, height)
    for part in parts:
        drawing.add(part)
    return drawing.image()


def file_name(sequence: str) -> str:
    """The sequence's name as part of a file name: where that changes it, a hash keeps two of them apart."""
    safe = re.sub(r"[^A-Za-z0-9_]", "_", sequence)[:80]
    if safe == sequence:
        return safe
    return f"{safe}-{hashlib.blake2b(sequence.encode(), digest_size=4).hexdigest()}"


def _counted(parts: Iterable[Events], positives: list[int]) -> Iterator[Events]:
    """The parts as they are; `positives` gets how many events of each are positive."""
    for part in parts:
        positives.append(int(np.count_nonzero(part.p)))
        yield part

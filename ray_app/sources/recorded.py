"""Windows of recordings that hold events and frames: where they lie, which events are drawn, which frame belongs.

A window's events are divided into `event_bins` parts of equal count and drawn as EventGPT draws them. As in the
reference, the middle part and the middle frame make the window's pair (`pairs_per_window: middle`); or each part
makes one, with the frame of the window that is nearest in time to the part's middle (`pairs_per_window: all`).
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import ConfigError, InputError
from ray_app.events.windows import Window, format_duration, windows_between
from ray_app.sources.base import ONE_EACH, RawPair, RejectedPair, SourceTask, Views, spread
from ray_app.sources.event_stream import EventImageBuilder, RecordedEvents, Slice, render_slices

SHORTEST_US, LONGEST_US = 50_000, 20_000_000
"""Range of a window's length."""
SHORTEST_GAP_US = 2_000
"""Shortest silence that can be asked for: DSEC's index counts in milliseconds."""
SHORTEST_STEP_US = 1_000
PAIRS_PER_TASK = 64
SECONDS_PER_TASK_US = 64_000_000
"""Most recorded time whose windows one task draws: long windows are few to a task."""

Pick = Literal["middle", "all"]
Sides = Callable[[NDArray[np.uint8], int], tuple[NDArray[np.uint8], NDArray[np.uint8]]]
"""Both pictures of a pair, (H, W, 3) each, from the drawn events and the number of the frame. InputError: no such."""


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Events and frames of which one window's pairs are made."""

    window: Window
    """The window."""
    frames: range
    """Numbers of its frames."""
    slices: tuple[Slice, ...] = ()
    """The events of each pair."""
    num_events: int = 0
    """All events of the window."""
    reason: InputError | None = None
    """Reason why it has no pair."""


@dataclass(frozen=True)
class WindowingConfig:
    """Settings by which recordings become pairs, whatever their format."""

    durations_us: tuple[int, ...]
    """Window lengths."""
    step_us: int | None = None
    """Distance between window starts; None: half of each duration."""
    pairs_per_window: Pick = "middle"
    """The middle event image of a window, or all of them."""
    event_bins: int = 5
    """Event images of a window, by equal count."""
    max_gap_us: int = 200_000
    """Longest time in a window without an event, or without a frame."""
    event_window_us: int | None = None
    """Events are taken from this length in the middle of the window; None: from all of it."""
    views: Views = ONE_EACH
    """Pictures of each pair."""

    def __post_init__(self) -> None:
        """ConfigError: settings that do not fit together."""
        if not self.durations_us:
            raise ConfigError("--durations names no window length; give one or several, such as 1s")
        for duration_us in self.durations_us:
            name = format_duration(duration_us)
            if not SHORTEST_US <= duration_us <= LONGEST_US:
                raise ConfigError(f"--durations ({name}) must be between 50ms and 20s")
            if self.event_window_us is not None and self.event_window_us > duration_us:
                raise ConfigError(
                    f"--event-window ({format_duration(self.event_window_us)}) is longer than the window ({name}); "
                    "it is the middle part of it"
                )
        if twice := [us for us, count in Counter(self.durations_us).items() if count > 1]:
            raise ConfigError(f"--durations names {format_duration(twice[0])} twice")
        if self.step_us is not None and self.step_us < SHORTEST_STEP_US:
            raise ConfigError(f"--step ({format_duration(self.step_us)}) must be 1ms or more")
        if self.max_gap_us < SHORTEST_GAP_US:
            raise ConfigError(f"--max-gap ({format_duration(self.max_gap_us)}) must be 2ms or more")
        if self.views != ONE_EACH and self.pairs_per_window == "all":
            raise ConfigError(
                "--pairs-per-window all makes a pair of each event image, and this encoder takes "
                f"{self.views.num_event_images} event images and {self.views.num_frames} frames; leave it out"
            )
        if not 1 <= self.event_bins <= PAIRS_PER_TASK:
            raise ConfigError(f"--event-bins ({self.event_bins}) must be between 1 and {PAIRS_PER_TASK}")

    @property
    def num_pairs(self) -> int:
        return self.event_bins if self.pairs_per_window == "all" else 1

    def names(self) -> list[str]:
        """Return the durations by name."""
        return [format_duration(duration_us) for duration_us in self.durations_us]

    def describe(self) -> dict[str, Any]:
        """Every setting, and in words what is drawn."""
        one = self.pairs_per_window == "middle" and self.views.num_event_images == 1
        part = "the middle one" if one else "each"
        frame = (
            "the middle frame"
            if self.pairs_per_window == "middle"
            else "the frame nearest to the image's middle in time"
        )
        return {
            "durations": self.names(),
            "steps": [format_duration(self._step(duration_us)) for duration_us in self.durations_us],
            "pairs_per_window": self.pairs_per_window,
            "event_bins": self.event_bins,
            "max_gap": format_duration(self.max_gap_us),
            "event_window": format_duration(self.event_window_us) if self.event_window_us else None,
            "events": "recorded",
            "event_image": f"{part} of {self.event_bins} of equal event count",
            "target": f"{frame} of the window",
        }

    def portions(self, first_us: int, last_us: int, order: Callable[[Window], int]) -> list[list[Window]]:
        """Divide the windows from the first to the last frame, of all durations, sorted by `order`, into tasks."""
        windows = [
            window
            for duration_us in self.durations_us
            for window in windows_between(first_us, last_us, duration_us, self._step(duration_us))
        ]
        portions: list[list[Window]] = []
        room = recorded_us = 0
        for window in sorted(windows, key=lambda window: (order(window), window.t_end_us)):
            length_us = window.t_end_us - window.t_start_us
            if not portions or room < self.num_pairs or recorded_us + length_us > SECONDS_PER_TASK_US:
                portions.append([])
                room, recorded_us = PAIRS_PER_TASK, 0
            portions[-1].append(window)
            room, recorded_us = room - self.num_pairs, recorded_us + length_us
        return portions

    def task(self, sequence: str, part: int, windows: list[Window], spec: dict[str, Any]) -> SourceTask:
        """Return a task for one portion of a sequence's windows."""
        lengths = "several" if len(self.durations_us) > 1 else self.names()[0]
        spec = {**spec, "windows": [[window.t_start_us, window.t_end_us] for window in windows]}
        name = f"{file_name(sequence)}-{lengths}-{part:05d}"
        return SourceTask(name, len(windows) * self.num_pairs, spec)

    def without_windows(self, tasks: list[SourceTask]) -> str | None:
        """Return the first duration of which the tasks have no window."""
        found = {end_us - start_us for task in tasks for start_us, end_us in task.spec["windows"]}
        return next((format_duration(us) for us in self.durations_us if us not in found), None)

    def pairs(
        self, sequence: str, events: RecordedEvents, times_us: NDArray[np.int64], windows: list[Window], sides: Sides
    ) -> Iterator[RawPair | RejectedPair]:
        """Return the pairs of the windows in their order, in one sweep over their events; `times_us` are the frames'.

        Too few events, no frame or a gap costs all pairs of a window, what cannot be read those that need it.
        """
        plans = [self._planned(events, times_us, window) for window in windows]
        sketches = render_slices(events, [each for plan in plans for each in plan.slices])
        images_per_pair = self.views.num_event_images
        for plan in plans:
            for i in range(self.num_pairs):
                try:
                    if plan.reason:
                        raise plan.reason
                    mine = list(islice(sketches, images_per_pair))
                    yield self._pair(sequence, plan, times_us, mine, sides)
                except InputError as error:
                    where = f"window [{plan.window.t_start_us}, {plan.window.t_end_us})"
                    where += f", image {i}" if self.num_pairs > 1 else ""
                    yield RejectedPair(sequence, where, str(error))

    def _pair(
        self,
        sequence: str,
        plan: WindowPlan,
        times_us: NDArray[np.int64],
        sketches: list[EventImageBuilder],
        sides: Sides,
    ) -> RawPair:
        drawn, number = [sketch.image() for sketch in sketches], plan.frames[len(plan.frames) // 2]
        if self.pairs_per_window == "all":
            middle_us = (sketches[0].first_us + sketches[0].last_us) / 2
            number = plan.frames[int(np.argmin(np.abs(times_us[plan.frames] - middle_us)))]
        event_HWC, target_HWC = sides(drawn[len(drawn) // 2], number)
        event_images: tuple[NDArray[np.uint8], ...] = ()
        frames: tuple[NDArray[np.uint8], ...] = ()
        if self.views.num_event_images > 1:
            event_images = tuple(sides(image, number)[0] for image in drawn)
        if self.views.num_frames > 1:
            frames = tuple(sides(drawn[0], each)[1] for each in spread(plan.frames, self.views.num_frames))
        return RawPair(
            sequence,
            plan.window.t_start_us,
            plan.window.t_end_us,
            event_HWC,
            target_HWC,
            num_events=plan.num_events,
            num_drawn=sum(sketch.stop - sketch.first for sketch in sketches),
            num_positive=sum(sketch.num_positive for sketch in sketches),
            target_t_us=int(times_us[number]),
            event_images=event_images,
            frames=frames,
        )

    def _planned(self, events: RecordedEvents, times_us: NDArray[np.int64], window: Window) -> WindowPlan:
        frames = range(*np.searchsorted(times_us, (window.t_start_us, window.t_end_us)).tolist())
        try:
            self._check_gaps(events, times_us[frames], window)
            bounds = self._bounds(events, window)
            num_events = bounds[-1] - bounds[0]
            if self.event_window_us is not None:
                num_events = events.index(window.t_end_us) - events.index(window.t_start_us)
        except InputError as error:
            return WindowPlan(window, frames, reason=error)
        slices = list(pairwise(bounds))
        if self.pairs_per_window == "middle" and self.views.num_event_images == 1:
            slices = [slices[self.event_bins // 2]]
        return WindowPlan(window, frames, tuple(slices), num_events)

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
        if self.event_window_us is not None:
            start_us += (end_us - start_us - self.event_window_us) // 2
            end_us = start_us + self.event_window_us
        first, stop = events.index(start_us), events.index(end_us)
        if stop - first < self.event_bins:
            raise InputError(
                f"{stop - first} events cannot be drawn as {self.event_bins} images; at least one each is needed"
            )
        count = (stop - first) // self.event_bins
        return [*(first + i * count for i in range(self.event_bins)), stop]


def first_gap(times_us: Iterable[int], longest_us: int) -> tuple[int, int] | None:
    """Return the first two neighbours that are further apart than `longest_us`."""
    return next(((a, b) for a, b in pairwise(times_us) if b - a > longest_us), None)


def by_start(window: Window) -> int:
    """Order of windows by their first microsecond."""
    return window.t_start_us


def by_middle(window: Window) -> int:
    """Order of windows by their middles: long and short ones then draw from the same stretch of the recording."""
    return window.t_start_us + window.t_end_us


def file_name(sequence: str) -> str:
    """Return the sequence's name as part of a file name: where that changes it, a hash keeps two of them apart."""
    safe = re.sub(r"[^A-Za-z0-9_]", "_", sequence)[:80]
    if safe == sequence:
        return safe
    return f"{safe}-{hashlib.blake2b(sequence.encode(), digest_size=4).hexdigest()}"

"""DSEC: recorded events and frames of real drives, cut into windows straight from the recordings.

A window's events are divided into `num_images` parts of equal count and drawn as EventGPT draws them. As in the
reference, the middle part and the middle frame make the window's pair (`pick: middle`); or each part makes one,
with the frame of the window that is nearest in time to the part's middle (`pick: all`). Only the part that is drawn
is read: places come from the file's millisecond index, and parts are drawn piece by piece, so that a window of
20 s and 300 million events takes no more memory than one of 50 ms.

With `align: infinite` the frame is drawn as the event camera sees it (events/views.py), and both sides are cut to
what both cameras see; with `none`, as in the reference, both stay whole and show different parts of the scene.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import ConfigError, InputError
from ray_app.events.recording import Events
from ray_app.events.render import Drawing
from ray_app.events.views import EventView
from ray_app.events.windows import Window, format_duration, windows_between
from ray_app.sources.base import RawPair, Rejected, SourceTask
from ray_app.sources.dsec_events import HEIGHT, WIDTH, DsecEvents
from ray_app.sources.dsec_files import DsecSequence, find_sequences, sequence_in

SHORTEST_US, LONGEST_US = 50_000, 20_000_000
"""Range of a window's length."""
SHORTEST_GAP_US = 2_000
"""Shortest silence that can be asked for: the recordings' index counts in milliseconds."""
SHORTEST_STEP_US = 1_000
PAIRS_PER_TASK = 64
SECONDS_PER_TASK_US = 64_000_000
"""Most recorded time whose windows one task draws: long windows are few to a task."""

Boundaries = Literal["us", "ms_floor"]
Pick = Literal["middle", "all"]
Align = Literal["infinite", "none"]
AskedAlign = Literal["auto", "infinite", "none"]


@dataclass(frozen=True)
class DsecSource:
    """Windows of every sequence of a dataset folder, from its first image time on, at each duration."""

    root: Path
    """Dataset folder."""
    durations_us: tuple[int, ...]
    """Window lengths."""
    step_us: int | None = None
    """Distance between window starts; None: half of each duration."""
    boundaries: Boundaries = "us"
    """`us`: to the microsecond; `ms_floor`: brought down to whole milliseconds of the file's clock, as EventGPT."""
    pick: Pick = "middle"
    """The middle event image of a window, or all of them."""
    align: AskedAlign = "auto"
    """`auto`: `infinite` where sequences have a calibration, else `none`."""
    num_images: int = 5
    """Event images of a window, by equal count."""
    max_gap_us: int = 200_000
    """Longest time in a window without an event, or without a frame."""
    event_slice_us: int | None = None
    """Events are taken from this length in the middle of the window; None: from all of it."""

    name = "dsec"

    def __post_init__(self) -> None:
        """ConfigError: settings that do not fit together."""
        if not self.durations_us:
            raise ConfigError("--durations names no window length; give one or several, such as 1s")
        for duration_us in self.durations_us:
            name = format_duration(duration_us)
            if not SHORTEST_US <= duration_us <= LONGEST_US:
                raise ConfigError(f"--durations ({name}) must lie between 50ms and 20s")
            if self.boundaries == "ms_floor" and duration_us % 1000:
                raise ConfigError(f"--durations ({name}) must be whole milliseconds with --boundaries ms_floor")
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

    def describe(self) -> dict[str, Any]:
        sequences = self._sequences()
        align = self._alignment(sequences)
        part = "the middle one" if self.pick == "middle" else "each"
        frame = "the middle frame" if self.pick == "middle" else "the frame nearest to the image's middle in time"
        return {
            "root": self.root.name,
            "sequences": [_identity(sequence, align) for sequence in sequences],
            "durations": self.durations(),
            "steps": [format_duration(self._step(duration_us)) for duration_us in self.durations_us],
            "boundaries": self.boundaries,
            "pick": self.pick,
            "align": align,
            "num_images": self.num_images,
            "max_gap": format_duration(self.max_gap_us),
            "event_slice": format_duration(self.event_slice_us) if self.event_slice_us else None,
            "events": "recorded",
            "event_image": f"{part} of {self.num_images} of equal event count",
            "target": f"{frame} of the window" + (", as the event camera sees it" if align == "infinite" else ""),
        }

    def durations(self) -> list[str]:
        return [format_duration(duration_us) for duration_us in self.durations_us]

    def tasks(self) -> list[SourceTask]:
        """Up to 64 pairs and 64 s of one sequence and duration each.

        InputError: a folder without sequences, a sequence with a part that is missing or damaged as a whole, or no
        window of a duration anywhere.
        """
        sequences = self._sequences()
        align = self._alignment(sequences)
        tasks: list[SourceTask] = []
        for sequence in sequences:
            times_us = sequence.times_us()
            with DsecEvents(sequence.events):
                pass  # damaged as a whole: said before hours of work, not after
            if align == "infinite":
                sequence.view()
            for duration_us in self.durations_us:
                tasks += self._tasks(sequence, align, times_us, duration_us)
        for duration_us in self.durations_us:
            if not any(task.spec["duration_us"] == duration_us for task in tasks):
                raise InputError(
                    f"no sequence of {self.root} is long enough for a window of {format_duration(duration_us)}; take "
                    "shorter --durations"
                )
        return sorted(tasks, key=lambda task: task.name)

    def pairs(self, task: SourceTask) -> Iterator[RawPair | Rejected]:
        """The task's pairs in order of time; a window that cannot be built costs its own pairs alone."""
        spec = task.spec
        sequence = sequence_in(self.root / spec["folder"], spec["sequence"])
        times_us = sequence.times_us()
        view = sequence.view() if spec["align"] == "infinite" else None
        each = self.num_images if self.pick == "all" else 1
        with DsecEvents(sequence.events) as events:
            for start_us in spec["starts_us"]:
                window = self._bounded(start_us, spec["duration_us"], events.t_offset_us)
                done = 0
                try:
                    for pair in self._pairs(sequence, events, times_us, view, window):
                        yield pair
                        done += 1
                except InputError as error:
                    where = f"window [{window.t_start_us}, {window.t_end_us})"
                    for i in range(done, each):
                        position = where if each == 1 else f"{where}, image {i}"
                        yield Rejected(sequence.name, position, str(error))

    def _pairs(
        self,
        sequence: DsecSequence,
        events: DsecEvents,
        times_us: NDArray[np.int64],
        view: EventView | None,
        window: Window,
    ) -> Iterator[RawPair]:
        """The pairs of one window. InputError: it has too few events, no frame, or a gap."""
        start_us, end_us = window.t_start_us, window.t_end_us
        first_frame, after_frames = np.searchsorted(times_us, (start_us, end_us), side="left").tolist()
        frames = np.arange(first_frame, after_frames)
        self._check_gaps(events, times_us[frames], window)
        bounds = self._bounds(events, window)
        wanted = range(self.num_images) if self.pick == "all" else [self.num_images // 2]
        targets: dict[int, NDArray[np.uint8]] = {}
        for i in wanted:
            number = int(frames[len(frames) // 2])
            if self.pick == "all":
                middle_us = (events.time_us(bounds[i]) + events.time_us(bounds[i + 1] - 1)) / 2
                number = int(frames[np.argmin(np.abs(times_us[frames] - middle_us))])
            drawn = painted(events.parts(bounds[i], bounds[i + 1]))
            event_HWC = drawn if view is None else view.crop.of(drawn)
            if number not in targets:  # short windows have one frame for all of their images
                frame = sequence.frame(number)
                targets = {number: frame if view is None else view.target(frame)}
            yield RawPair(
                sequence.name,
                start_us,
                end_us,
                event_HWC,
                targets[number],
                num_events=events.index(end_us) - events.index(start_us),
                num_drawn=bounds[i + 1] - bounds[i],
            )

    def _check_gaps(self, events: DsecEvents, frames_us: NDArray[np.int64], window: Window) -> None:
        start_us, end_us = window.t_start_us, window.t_end_us
        if not len(frames_us):
            raise InputError("no frame was taken in the window")
        silences = [("event", events.silence(start_us, end_us, self.max_gap_us))]
        around = pairwise([start_us, *frames_us.tolist(), end_us])
        silences.append(("frame", next(((a, b) for a, b in around if b - a > self.max_gap_us), None)))
        for what, gap in silences:
            if gap:
                raise InputError(
                    f"no {what} for {(gap[1] - gap[0]) / 1000:.3f} ms from {gap[0]} µs on; --max-gap allows "
                    f"{format_duration(self.max_gap_us)}"
                )

    def _bounds(self, events: DsecEvents, window: Window) -> list[int]:
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

    def _bounded(self, start_us: int, duration_us: int, t_offset_us: int) -> Window:
        """The window that starts there; its length stays the same, for it is whole milliseconds where floored."""
        if self.boundaries == "ms_floor":
            start_us -= (start_us - t_offset_us) % 1000
        return Window(start_us, start_us + duration_us)

    def _step(self, duration_us: int) -> int:
        return self.step_us or duration_us // 2

    def _sequences(self) -> list[DsecSequence]:
        """All sequences, sorted by name. InputError: see find_sequences; two that are the same recording."""
        sequences = [sequence_in(folder, name) for folder, name in find_sequences(self.root)]
        seen: dict[Path, str] = {}
        for sequence in sequences:
            _check_name(sequence.name)
            file = sequence.events.resolve()
            if file in seen:
                raise InputError(
                    f"sequences '{seen[file]}' and '{sequence.name}' are the same file, {file}; a split would put "
                    "one drive on both of its sides. Remove one of them"
                )
            seen[file] = sequence.name
        return sequences

    def _alignment(self, sequences: list[DsecSequence]) -> Align:
        """What --align asks for, or what the sequences allow; the same for all of them."""
        lacking = [sequence.name for sequence in sequences if sequence.calibration is None]
        if self.align == "none" or (self.align == "auto" and len(lacking) == len(sequences)):
            return "none"
        if lacking:
            raise InputError(
                f"{len(lacking)} of {len(sequences)} sequences have no calibration/cam_to_cam.yaml, '{lacking[0]}' "
                "for instance; add it, or take --align none for all"
            )
        return "infinite"

    def _tasks(
        self, sequence: DsecSequence, align: Align, times_us: NDArray[np.int64], duration_us: int
    ) -> Iterator[SourceTask]:
        first_us, last_us = int(times_us[0]), int(times_us[-1])
        step_us = self._step(duration_us)
        starts_us = [window.t_start_us for window in windows_between(first_us, last_us, duration_us, step_us)]
        each = self.num_images if self.pick == "all" else 1
        size = max(min(PAIRS_PER_TASK // each, SECONDS_PER_TASK_US // duration_us), 1)
        for part, first in enumerate(range(0, len(starts_us), size)):
            mine = starts_us[first : first + size]
            spec = {
                "folder": str(sequence.folder.relative_to(self.root)),
                "sequence": sequence.name,
                "align": align,
                "duration_us": duration_us,
                "starts_us": mine,
            }
            yield SourceTask(
                f"{_file_name(sequence.name)}-{format_duration(duration_us)}-{part:05d}", len(mine) * each, spec
            )


def painted(parts: Iterable[Events]) -> NDArray[np.uint8]:
    """The event image of parts that follow each other in time: the last event at a pixel wins, over parts too."""
    drawing = Drawing(WIDTH, HEIGHT)
    for part in parts:
        drawing.add(part)
    return drawing.image()


def _identity(sequence: DsecSequence, align: Align) -> dict[str, Any]:
    """What tells one recording from another in the manifest."""
    with DsecEvents(sequence.events) as events:
        identity = {
            "sequence": sequence.name,
            "events": len(events),
            "t_offset_us": events.t_offset_us,
            "frames": len(sequence.times_us()),
        }
    if sequence.calibration and align == "infinite":
        identity["calibration_sha256"] = hashlib.sha256(sequence.calibration.read_bytes()).hexdigest()
    return identity


def _check_name(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the sequence's name {name!r} is no valid text (UTF-8); rename the folder") from error


def _file_name(sequence: str) -> str:
    """The sequence's name as part of a file name: where that changes it, a hash keeps two of them apart."""
    safe = re.sub(r"[^A-Za-z0-9_]", "_", sequence)[:80]
    if safe == sequence:
        return safe
    return f"{safe}-{hashlib.blake2b(sequence.encode(), digest_size=4).hexdigest()}"

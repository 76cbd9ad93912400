"""Real footage as pairs: each frame is a target, and the events around it are simulated from the frames.

A video file is read by its frames' own times; a folder of frames by the numbers in their names and `fps`. A frame is
blended into the next one; where that is much later than usual it is shown until then, as a player does.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ray_app.errors import InputError
from ray_app.events.recording import Events
from ray_app.events.render import drawn_parts, event_image
from ray_app.events.simulator import EventSimulator, SimulatedEvents, SimulatorConfig
from ray_app.events.windows import format_duration
from ray_app.sources.base import (
    ONE_EACH,
    RawPair,
    RejectedPair,
    SourceTask,
    Views,
    file_identity,
    named_sequences,
    require_visible,
    spread,
)
from ray_app.sources.images import images_in, read_image
from ray_app.sources.recorded import file_name
from ray_app.sources.video_decoder import Frame, video_frames
from ray_app.sources.video_index import read_index

CAMERA = SimulatorConfig(
    theta_on=0.1, theta_off=0.1, cutoff_hz=200.0, leak_rate_hz=0.1, shot_noise_hz=1.0, refractory_us=300
)
"""Brings 25 Hz driving footage to the event rates of real recordings of driving."""
SUBSTEP_US = 10_000
"""Frames further apart than this are blended linearly in between; finer steps change counts by under 1 %."""
LEAD_FRAMES = 5
"""Frames that the simulation runs through before a task's first window, to forget where it began."""
LONG_GAP = 2.5
"""A frame that is shown for longer than so many usual intervals holds until the next: it is not blended into it."""
VIDEO_PAIRS_PER_TASK = 48
MOST_NUMBERS_EACH = 100
"""With so many numbers for each image of a folder they are no numbers of frames, but times, say."""


@dataclass(frozen=True)
class VideoSource:
    """Pairs of every `frame_stride`-th frame whose window is within its video."""

    files: tuple[Path, ...]
    """Video files, or folders of frames."""
    fps: float | None
    """Frames per second of folders; of files, where it is to replace their own times."""
    seed: int
    """Seed of the sensor noise."""
    width: int = 640
    """Sensor columns; frames are resized to the sensor as a whole."""
    height: int = 480
    """Sensor rows."""
    duration_us: int = 50_000
    """Length of a window, centred on its frame."""
    frame_stride: int = 1
    """Frames from one pair to the next."""
    views: Views = ONE_EACH
    """Pictures of each pair."""

    @property
    def name(self) -> str:
        return "video"

    def describe(self) -> dict[str, Any]:
        return {
            "videos": [{"sequence": name, **identity(path)} for name, path in named_sequences(self.files)],
            "events": "simulated",
            "fps": self.fps,
            "seed": self.seed,
            "sensor": [self.width, self.height],
            "duration": format_duration(self.duration_us),
            "frame_stride": self.frame_stride,
            "simulator": asdict(CAMERA),
            "substep_us": SUBSTEP_US,
            "lead_frames": LEAD_FRAMES,
            "holds_after_usual_intervals": LONG_GAP,
            "event_image": "all events of the window as one image",
            "target": "the frame at the window's centre",
        }

    def durations(self) -> list[str]:
        return [format_duration(self.duration_us)]

    def tasks(self) -> list[SourceTask]:
        """One for each 48 pairs of a video; one that cannot be used is a rejected pair. InputError: none can be."""
        tasks, unusable = [], []
        for number, (name, path) in enumerate(named_sequences(self.files)):
            try:
                frames = self._frames_with_room(path)
            except InputError as error:
                unusable.append(error)
                tasks.append(SourceTask(f"{file_name(name)}-00000", 1, {"video": number, "unusable": str(error)}))
                continue
            for part, first in enumerate(range(0, len(frames), VIDEO_PAIRS_PER_TASK)):
                mine = frames[first : first + VIDEO_PAIRS_PER_TASK]
                tasks.append(
                    SourceTask(f"{file_name(name)}-{part:05d}", len(mine), {"video": number, "frames": mine})
                )
        if len(unusable) == len(tasks):
            raise unusable[0] if unusable else InputError("no video is named")
        return sorted(tasks, key=lambda task: task.name)

    def _frames_with_room(self, path: Path) -> list[int]:
        """Return the frames whose windows are within their video. InputError: it cannot be read, or is too short."""
        times_us = frame_times(path, self.fps)
        half = self.duration_us // 2
        frames = [
            i
            for i in range(0, len(times_us), self.frame_stride)
            if times_us[i] - half >= times_us[0] and times_us[i] - half + self.duration_us <= times_us[-1]
        ]
        if not frames:
            length_us = times_us[-1] - times_us[0]
            raise InputError(
                f"{path} has {len(times_us)} frames in {length_us / 1e6:.3f} s, too short for a window of "
                f"{format_duration(self.duration_us)}; take a shorter --duration"
            )
        return frames

    def pairs(self, task: SourceTask) -> Iterator[RawPair | RejectedPair]:
        """Return the task's pairs in order. A frame that is missing costs the pairs whose windows touch it."""
        name, path = named_sequences(self.files)[task.spec["video"]]
        if "unusable" in task.spec:
            yield RejectedPair(str(path), "the whole video", task.spec["unusable"])
            return
        require_visible(path)
        wanted = task.spec["frames"]
        times_us = frame_times(path, self.fps)
        half = self.duration_us // 2
        starts = {i: times_us[i] - half for i in wanted}
        last_end = starts[wanted[-1]] + self.duration_us
        first = max(int(np.searchsorted(times_us, starts[wanted[0]], side="right")) - 1 - LEAD_FRAMES, 0)
        stop = int(np.searchsorted(times_us, last_end, side="left")) + 1
        rng = np.random.default_rng([self.seed, task.spec["video"], wanted[0]])
        footage = _Footage(EventSimulator(CAMERA, self.height, self.width, rng), times_us, self.duration_us)
        frames_of = {i: self._frames_of(i, times_us, starts[i]) for i in wanted}
        kept = {*wanted, *(number for numbers in frames_of.values() for number in numbers)}
        targets: dict[int, Frame] = {}
        pending = list(wanted)
        for i, frame in frames(path, first, stop):
            footage.add(i, frame)
            if i in kept and not isinstance(frame, str):
                targets[i] = frame
            while pending and footage.until_us >= starts[pending[0]] + self.duration_us:
                yield self._pair(name, path, pending[0], starts, frames_of, targets, footage)
                pending.pop(0)
                oldest = min(pending[0], frames_of[pending[0]][0]) if pending else len(times_us)
                targets = {number: each for number, each in targets.items() if number >= oldest}

    def _frames_of(self, i: int, times_us: list[int], start_us: int) -> list[int]:
        """Return the numbers of a window's frames that are wanted, in order; `i` is the middle one."""
        if self.views.num_frames == 1:
            return [i]
        inside = range(*np.searchsorted(times_us, (start_us, start_us + self.duration_us)).tolist())
        return spread(inside, self.views.num_frames)

    def _pair(
        self,
        name: str,
        path: Path,
        i: int,
        starts: dict[int, int],
        frames_of: dict[int, list[int]],
        targets: dict[int, Frame],
        footage: "_Footage",
    ) -> RawPair | RejectedPair:
        start, end = starts[i], starts[i] + self.duration_us
        if flaw := footage.flaw(start, end):
            return RejectedPair(str(path), f"frame {i}", flaw)
        events = footage.take(start, end, self.width, self.height)
        images: tuple[Frame, ...] = ()
        if self.views.num_event_images > 1:
            images = tuple(event_image(part) for part in drawn_parts(events, self.views.num_event_images))
        return RawPair(
            name,
            start,
            end,
            event_image(events),
            targets[i],
            num_events=len(events),
            num_drawn=len(events),
            num_positive=int(np.count_nonzero(events.p)),
            target_t_us=footage.time_us(i),
            event_images=images,
            frames=tuple(targets[number] for number in frames_of[i]) if self.views.num_frames > 1 else (),
        )


class _Footage:
    """Events simulated along a video's frames, frame after frame."""

    def __init__(self, simulator: EventSimulator, times_us: list[int], duration_us: int) -> None:
        self._simulator, self._times_us = simulator, times_us
        self._usual_us = max(int(np.median(np.diff(times_us))), 1)
        self._reach_us = duration_us + LEAD_FRAMES * self._usual_us
        """How far windows of a frame reach, and what the simulation needs to forget where it began."""
        self._chunks: list[SimulatedEvents] = []
        self._flaws: list[tuple[int, int, str]] = []
        self._grey: NDArray[np.float32] | None = None
        self._shown = -1
        """Number of the last frame that was good."""
        self.until_us = -1

    def add(self, i: int, frame: Frame | str) -> None:
        """Take the next frame, or its error: then no window may reach from the one before to the next."""
        t_us = self._times_us[i]
        if isinstance(frame, str):
            before = self._times_us[max(i - 1, 0)]
            after = self._times_us[min(i + 1, len(self._times_us) - 1)]
            self._flaws.append((before, after, frame))
            self.until_us = max(self.until_us, t_us)
            return
        simulator = self._simulator
        size = (simulator.width, simulator.height)
        grey = np.asarray(Image.fromarray(frame).convert("L").resize(size, Image.Resampling.BILINEAR), np.float32)
        if self._grey is None:
            simulator.start(grey, t_us, random_phase=True)
        else:
            if self._shown == i - 1 and t_us - simulator.t_us > LONG_GAP * self._usual_us:
                self._hold(self._grey, t_us - min(SUBSTEP_US, self._usual_us))
            self._blend(self._grey, grey, t_us)
        self._grey, self._shown, self.until_us = grey, i, t_us

    def _blend(self, before: NDArray[np.float32], grey: NDArray[np.float32], t_us: int) -> None:
        """Go from one picture to the next linearly."""
        begin_us = self._simulator.t_us
        substeps = -(-(t_us - begin_us) // SUBSTEP_US)
        for k in range(1, substeps + 1):
            share = np.float32(k / substeps)
            blend = grey if k == substeps else before * (1 - share) + grey * share
            self._chunks.append(self._simulator.step(blend, begin_us + (t_us - begin_us) * k // substeps))

    def _hold(self, grey: NDArray[np.float32], until_us: int) -> None:
        """Keep a picture; of a pause that is longer than windows reach, the middle is left out."""
        simulator = self._simulator
        if until_us - simulator.t_us > 2 * self._reach_us:
            self._blend(grey, grey, simulator.t_us + self._reach_us)
            simulator.start(grey, until_us - self._reach_us, random_phase=True)
        self._blend(grey, grey, until_us)

    def time_us(self, i: int) -> int:
        """Return when a frame was taken."""
        return self._times_us[i]

    def flaw(self, start_us: int, end_us: int) -> str:
        """Return the error within a window, or None."""
        return next((what for a, b, what in self._flaws if a < end_us and b > start_us), "")

    def take(self, start_us: int, end_us: int, width: int, height: int) -> Events:
        """Events of a window; those before it are forgotten, since windows come in order."""
        self._chunks = [c for c in self._chunks if c.t_us.size and c.t_us[-1] >= start_us]
        found = SimulatedEvents.joined([c for c in self._chunks if c.t_us[0] < end_us] or [SimulatedEvents.none()])
        return Events(found.x, found.y, found.t_us, found.p, width, height).between(start_us, end_us)


def frame_times(path: Path, fps: float | None) -> list[int]:
    """Time of every frame in microseconds from the first one on; nothing is decoded. InputError: see read_index."""
    if path.is_dir():
        if not fps:
            raise InputError(f"{path} is a folder of frames, whose rate is not known; give it with --fps")
        numbers = _numbered(path)
        return [round(1e6 * n / fps) for n in range(max(numbers) - min(numbers) + 1)]
    times_us = read_index(path).times_us
    return [round(1e6 * i / fps) for i in range(len(times_us))] if fps else list(times_us)


def frames(path: Path, first: int, stop: int) -> Iterator[tuple[int, Frame | str]]:
    """Yield (number, picture or error) of frames [first, stop), of as many as there are."""
    if not path.is_dir():
        yield from video_frames(path, first, min(stop, len(read_index(path).times_us)))
        return
    numbers = _numbered(path)
    low = min(numbers)
    for i in range(first, min(stop, max(numbers) - low + 1)):
        try:
            if low + i not in numbers:
                raise InputError(f"frame {low + i} is missing in {path}")
            yield i, read_image(numbers[low + i])
        except InputError as error:
            yield i, str(error)


def identity(path: Path) -> dict[str, Any]:
    """Return a video's name and content, for a manifest. InputError: it cannot be read."""
    return {"file": path.name, "frames": len(images_in(path))} if path.is_dir() else file_identity(path)


def _numbered(folder: Path) -> dict[int, Path]:
    """Frames by the last number in their names. InputError: none, or two with one number."""
    numbers: dict[int, Path] = {}
    for path in images_in(folder):
        found = re.findall(r"\d+", path.stem)
        if not found:
            raise InputError(f"{path} has no number in its name, so its place in time is not known")
        if int(found[-1]) in numbers:
            raise InputError(f"{path} and {numbers[int(found[-1])].name} bear the same number")
        numbers[int(found[-1])] = path
    if not numbers:
        raise InputError(f"{folder} holds no image files")
    low, high = min(numbers), max(numbers)
    if high - low >= MOST_NUMBERS_EACH * len(numbers):
        raise InputError(
            f"{folder} holds {len(numbers)} images with numbers from {low} to {high}: that leaves out most of them; "
            "number them in steps of 1"
        )
    return numbers

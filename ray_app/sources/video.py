"""Real footage as pairs: each frame is a target, and the events around it are simulated from the frames.

A video file is read by its frames' own times; a folder of frames by the numbers in their names and `fps`.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray
from PIL import Image

from ray_app.errors import InputError
from ray_app.events.recording import Events
from ray_app.events.render import event_image
from ray_app.events.simulator import EventSimulator, SimulatedEvents, SimulatorConfig
from ray_app.events.windows import format_duration
from ray_app.sources.base import RawPair, RejectedPair, SourceTask, file_identity, named_sequences, require_visible
from ray_app.sources.images import images_in, read_image

CAMERA = SimulatorConfig(
    theta_on=0.1, theta_off=0.1, cutoff_hz=200.0, leak_rate_hz=0.1, shot_noise_hz=1.0, refractory_us=300
)
"""Brings 25 Hz driving footage to the event rates of real recordings of driving."""
SUBSTEP_US = 10_000
"""Frames further apart than this are blended linearly in between; finer steps change counts by under 1 %."""
LEAD_FRAMES = 5
"""Frames that the simulation runs through before a task's first window, to forget where it began."""
VIDEO_PAIRS_PER_TASK = 48

Frame = NDArray[np.uint8]


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
            "event_image": "all events of the window as one image",
            "target": "the frame at the window's centre",
        }

    def durations(self) -> list[str]:
        return [format_duration(self.duration_us)]

    def tasks(self) -> list[SourceTask]:
        """One for each 48 pairs of a video. InputError: a video that cannot be opened, or is too short."""
        tasks = []
        for number, (name, path) in enumerate(named_sequences(self.files)):
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
            for part, first in enumerate(range(0, len(frames), VIDEO_PAIRS_PER_TASK)):
                mine = frames[first : first + VIDEO_PAIRS_PER_TASK]
                spec = {"video": number, "frames": mine}
                tasks.append(SourceTask(f"{name}-{part:04d}", len(mine), spec))
        return tasks

    def pairs(self, task: SourceTask) -> Iterator[RawPair | RejectedPair]:
        """Return the task's pairs in order. A frame that is missing costs the pairs whose windows touch it."""
        name, path = named_sequences(self.files)[task.spec["video"]]
        require_visible(path)
        wanted = task.spec["frames"]
        times_us = frame_times(path, self.fps)
        half = self.duration_us // 2
        starts = {i: times_us[i] - half for i in wanted}
        last_end = starts[wanted[-1]] + self.duration_us
        first = max(int(np.searchsorted(times_us, starts[wanted[0]], side="right")) - 1 - LEAD_FRAMES, 0)
        stop = int(np.searchsorted(times_us, last_end, side="left")) + 1
        rng = np.random.default_rng([self.seed, task.spec["video"], wanted[0]])
        footage = _Footage(EventSimulator(CAMERA, self.height, self.width, rng), times_us)
        targets: dict[int, Frame] = {}
        pending = list(wanted)
        for i, frame in frames(path, first, stop):
            footage.add(i, frame)
            if i in starts and not isinstance(frame, str):
                targets[i] = frame
            while pending and footage.until_us >= starts[pending[0]] + self.duration_us:
                yield self._pair(name, path, pending[0], starts, targets, footage)
                pending.pop(0)
        for i in pending:
            reason = f"the video ends before the window does: frame {footage.last} is the last of {len(times_us)}"
            yield RejectedPair(str(path), f"frame {i}", reason)

    def _pair(
        self,
        name: str,
        path: Path,
        i: int,
        starts: dict[int, int],
        targets: dict[int, Frame],
        footage: "_Footage",
    ) -> RawPair | RejectedPair:
        start, end = starts[i], starts[i] + self.duration_us
        if flaw := footage.flaw(start, end):
            return RejectedPair(str(path), f"frame {i}", flaw)
        events = footage.take(start, end, self.width, self.height)
        return RawPair(
            name,
            start,
            end,
            event_image(events),
            targets.pop(i),
            num_events=len(events),
            num_drawn=len(events),
            num_positive=int(np.count_nonzero(events.p)),
            target_t_us=footage.time_us(i),
        )


class _Footage:
    """Events simulated along a video's frames, frame after frame."""

    def __init__(self, simulator: EventSimulator, times_us: list[int]) -> None:
        self._simulator, self._times_us = simulator, times_us
        self._chunks: list[SimulatedEvents] = []
        self._flaws: list[tuple[int, int, str]] = []
        self._grey: NDArray[np.float32] | None = None
        self.last = -1
        self.until_us = -1

    def add(self, i: int, frame: Frame | str) -> None:
        """Return the next frame, or an error: then no window may reach from the one before to the next."""
        t_us = self._times_us[i]
        self.last = i
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
            begin_us = simulator.t_us
            substeps = -(-(t_us - begin_us) // SUBSTEP_US)
            for k in range(1, substeps + 1):
                share = np.float32(k / substeps)
                blend = grey if k == substeps else self._grey * (1 - share) + grey * share
                self._chunks.append(simulator.step(blend, begin_us + (t_us - begin_us) * k // substeps))
        self._grey, self.until_us = grey, t_us

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
    """Time of every frame in microseconds, from the container's index: nothing is decoded."""
    if path.is_dir():
        if not fps:
            raise InputError(f"{path} is a folder of frames, whose rate is not known; give it with --fps")
        numbers = _numbered(path)
        return [round(1e6 * n / fps) for n in range(max(numbers) - min(numbers) + 1)]
    stamps = _packets(path)
    if fps:
        return [round(1e6 * i / fps) for i in range(len(stamps))]
    return [round(stamp * 1_000_000) for stamp in stamps]


def frames(path: Path, first: int, stop: int) -> Iterator[tuple[int, Frame | str]]:
    """Yield (number, picture or error) from `first` on; ends early where the video does."""
    if path.is_dir():
        numbers = _numbered(path)
        low = min(numbers)
        for i in range(first, min(stop, max(numbers) - low + 1)):
            try:
                if low + i not in numbers:
                    raise InputError(f"frame {low + i} is missing in {path}")
                yield i, read_image(numbers[low + i])
            except InputError as error:
                yield i, str(error)
    else:
        yield from _decoded(path, first, stop)


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
    return numbers


def _packets(path: Path) -> list[Fraction]:
    """Presentation time of every frame in seconds, sorted. InputError: no video, or not a single frame."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path} has no video stream")
            stream = container.streams.video[0]
            base = stream.time_base or Fraction(1, 1_000_000)
            stamps = sorted({packet.pts for packet in container.demux(stream) if packet.pts is not None})
    except (FFmpegError, OSError) as error:
        raise InputError(f"{path} is no readable video: {error}") from error
    if not stamps:
        raise InputError(f"{path} holds no frame")
    return [stamp * base for stamp in stamps]


def _decoded(path: Path, first: int, stop: int) -> Iterator[tuple[int, Frame | str]]:
    """Frames [first, stop) of a file, decoded from the key frame before; ends early where decoding does."""
    number = {stamp: i for i, stamp in enumerate(_packets(path))}
    stamps = list(number)
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_count = 1  # Ray runs one task for each core
            base = stream.time_base or Fraction(1, 1_000_000)
            container.seek(int(stamps[first] / base), stream=stream, backward=True)
            for frame in container.decode(stream):
                i = number.get((frame.pts or 0) * base, -1)
                if i >= stop:
                    return
                if i >= first:
                    yield i, np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    except (FFmpegError, OSError):
        return  # the pairs that are missing then are rejected, each with the last frame there was

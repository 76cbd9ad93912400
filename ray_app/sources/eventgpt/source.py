"""The reference's dataset folder: event images and frames, clip by clip.

event_image/<seq>/<clip>_{0..4}.png   images of one clip's events; the middle one is the event side
event_image_1f/<seq>/<clip>_0.png     or its events as one image
event_npy/<seq>/<clip>.npy            its events, drawn here where the images are missing
video/<seq>/<clip>/*.png              its frames; the middle one is the target side
EventGPT_Instruction_Subset.json      the list of clips (sources/eventgpt_list.py)

EventGPT's own 50 ms recordings have no images and do not name their start: it is that of their first event.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import ConfigError, InputError
from ray_app.events.render import equal_counts, event_image
from ray_app.events.windows import format_duration, parse_duration
from ray_app.sources.base import (
    ONE_EACH,
    RawPair,
    RejectedPair,
    SourceTask,
    Views,
    file_identity,
    require_visible,
    spread,
)
from ray_app.sources.eventgpt.clips import INSTRUCTIONS, EventGptClip, found_clips, image_folder, listed_clips
from ray_app.sources.images import images_in, read_image
from ray_app.sources.npy import events_of, read_npy
from ray_app.sources.recorded import PAIRS_PER_TASK, file_name

SENSOR = (640, 480)
"""Columns and rows of DSEC's event camera."""
ADJOINING_US = 50_000
"""Clips up to this length follow each other without overlap; longer ones overlap by half."""
SLACK_US = 2_000
"""Clips are cut at whole milliseconds, by EventGPT down and by the reference outwards on both sides."""
SHORT_CLOCK_US = 2**17
"""A recording that begins before this has a clock of its own, not that of its sequence."""


@dataclass(frozen=True)
class EventGptSource:
    """Clips of a dataset folder: those that its list names, or every one that is found."""

    root: Path
    """Dataset folder."""
    duration_us: int
    """Length of a clip."""
    step_us: int
    """Distance between clips, for those whose recording does not tell its times."""
    instructions: Path | None = None
    """The list; None: every clip that is found."""
    event_bins: int = 5
    """Event images of a clip, by equal event count: 5 or 1."""
    views: Views = ONE_EACH
    """Pictures of each pair."""

    name = "eventgpt"

    @classmethod
    def of_folder(
        cls,
        root: Path,
        duration_us: int | None = None,
        step_us: int | None = None,
        instructions: Path | None = None,
        event_bins: int = 5,
        views: Views = ONE_EACH,
    ) -> Self:
        """Read from the folder's name (`…_500ms`) and its list what is not given.

        ConfigError: other event images are wanted than the middle one or all.
        """
        if views.num_event_images not in (1, event_bins):
            raise ConfigError(
                f"--num-event-images ({views.num_event_images}): a clip has {event_bins} event images; take 1, the "
                f"middle one, or all {event_bins}"
            )
        duration_us = duration_us or named_duration(root) or 1_000_000
        step_us = step_us or (duration_us if duration_us <= ADJOINING_US else duration_us // 2)
        own = root / INSTRUCTIONS
        return cls(root, duration_us, step_us, instructions or (own if own.is_file() else None), event_bins, views)

    def describe(self) -> dict[str, Any]:
        return {
            "root": self.root.name,
            "duration": format_duration(self.duration_us),
            "step": format_duration(self.step_us),
            "instructions": file_identity(self.instructions) if self.instructions else None,
            "event_bins": self.event_bins,
            "events": "recorded",
            "event_image": f"the middle one of {self.event_bins} in {image_folder(self.event_bins)}; drawn from "
            "event_npy where missing",
            "target": "the middle frame",
            "align": "none",
        }

    def durations(self) -> list[str]:
        return [format_duration(self.duration_us)]

    def tasks(self) -> list[SourceTask]:
        """One for each 64 clips of a sequence. InputError: no such folder, or nothing in it."""
        if not self.root.is_dir():
            raise InputError(f"{self.root} is not a folder; `prepare eventgpt` wants the dataset's top folder")
        clips = (
            listed_clips(self.instructions, self.event_bins)
            if self.instructions
            else found_clips(self.root, self.event_bins)
        )
        tasks = []
        for sequence, of_sequence in groupby(clips, key=lambda clip: clip.sequence):
            mine = list(of_sequence)
            for part, first in enumerate(range(0, len(mine), PAIRS_PER_TASK)):
                portion = mine[first : first + PAIRS_PER_TASK]
                spec = {"clips": [clip.spec() for clip in portion], "first": first}
                tasks.append(SourceTask(f"{file_name(sequence)}-{part:05d}", len(portion), spec))
        if not tasks:
            raise InputError(
                f"{self.root} holds no clips; it needs {image_folder(self.event_bins)}/<seq>/<clip>_0.png … or "
                "event_npy/<seq>/<clip>.npy, and video/<seq>/<clip>/*.png"
            )
        return sorted(tasks, key=lambda task: task.name)

    def pairs(self, task: SourceTask) -> Iterator[RawPair | RejectedPair]:
        """Return the task's clips in order; each that cannot be read costs itself alone."""
        require_visible(self.root)
        for number, spec in enumerate(task.spec["clips"], start=task.spec["first"]):
            clip = EventGptClip(**spec)
            try:
                yield self._pair(clip, number)
            except InputError as error:
                yield RejectedPair(f"{clip.sequence}/{clip.name}", f"clip {clip.name}", str(error))

    def _pair(self, clip: EventGptClip, number: int) -> RawPair:
        if clip.flaw:
            raise InputError(clip.flaw)
        images, t_start_us = self._event_side(clip)
        if t_start_us is None:  # nominal: clips follow each other by `step`
            t_start_us = (int(clip.name) if clip.name.isdecimal() else number) * self.step_us
        folder = self.root / clip.video
        frames = images_in(folder) if folder.is_dir() else []
        if not frames:
            raise InputError(f"{folder} holds no frame")
        several = self.views.num_frames > 1
        wanted = spread(range(len(frames)), self.views.num_frames) if several else []
        return RawPair(
            clip.sequence,
            t_start_us,
            t_start_us + self.duration_us,
            images[len(images) // 2],
            read_image(frames[len(frames) // 2]),
            event_images=tuple(images) if len(images) > 1 else (),
            frames=tuple(read_image(frames[place]) for place in wanted),
        )

    def _event_side(self, clip: EventGptClip) -> tuple[list[NDArray[np.uint8]], int | None]:
        """Return the event images that are wanted, and the start of the clip if its recording has one."""
        one = self.views.num_event_images == 1
        npy, paths = self.root / clip.npy, [self.root / path for path in ([clip.image] if one else clip.images)]
        missing = next((path for path in paths if not path.exists()), None)
        if missing is None:
            return [read_image(path) for path in paths], None
        if not npy.exists():
            raise InputError(f"{missing} is missing, and so is {npy}")
        content = read_npy(npy)
        events = events_of(content, *SENSOR, str(npy))
        parts = equal_counts(events, self.event_bins)
        drawn = [event_image(part) for part in ([parts[self.event_bins // 2]] if one else parts)]
        first_us, last_us = int(events.t_us[0]), int(events.t_us[-1])
        if last_us - first_us > self.duration_us + SLACK_US:
            raise InputError(
                f"{npy}: its events span {(last_us - first_us) / 1000:.3f} ms, more than a clip of "
                f"{format_duration(self.duration_us)}; give the clips' length with --duration, and times in "
                "microseconds, not nanoseconds"
            )
        start = content.get("time_start")
        if isinstance(start, int | np.integer):
            return drawn, int(start)
        return drawn, first_us if first_us >= SHORT_CLOCK_US else None


def named_duration(root: Path) -> int | None:
    """Return the clips' length by the folder's name, as the reference names it: `my_egpt_dsec_train_500ms`."""
    match = re.search(r"_([1-9]\d*m?s)$", root.name)
    return parse_duration(match[1]) if match else None

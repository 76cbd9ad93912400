"""The reference's dataset folder: event images and frames, clip by clip.

event_image/<seq>/<clip>_{0..4}.png   images of one clip's events; the middle one is the event side
event_npy/<seq>/<clip>.npy            its events, drawn here where the images are missing
video/<seq>/<clip>/*.png              its frames; the middle one is the target side
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import InputError
from ray_app.events.render import equal_counts, event_image
from ray_app.events.windows import format_duration
from ray_app.sources.base import RawPair, Rejected, SourceTask
from ray_app.sources.images import images_in, natural, read_image
from ray_app.sources.npy import events_of, read_npy

NUM_IMAGES = 5
"""Event images of a clip, by equal event count."""
SENSOR = (640, 480)
"""Columns and rows of DSEC's event camera."""
PAIRS_PER_TASK = 64


@dataclass(frozen=True)
class EventGptSource:
    """Every clip of every sequence of a dataset folder."""

    root: Path
    """Dataset folder."""
    duration_us: int
    """Length of a clip."""
    step_us: int
    """Distance between clips, for those whose recording does not tell its times."""

    @property
    def name(self) -> str:
        return "eventgpt"

    def describe(self) -> dict[str, Any]:
        return {
            "root": self.root.name,
            "duration": format_duration(self.duration_us),
            "step": format_duration(self.step_us),
            "events": "recorded",
            "event_image": f"the middle one of {NUM_IMAGES}; drawn from event_npy where missing",
            "target": "the middle frame",
            "align": "none",
        }

    def durations(self) -> list[str]:
        return [format_duration(self.duration_us)]

    def tasks(self) -> list[SourceTask]:
        """One for each 64 clips of a sequence. InputError: no such folder, or nothing in it."""
        if not self.root.is_dir():
            raise InputError(f"{self.root} is not a folder; `prepare eventgpt` wants the dataset's top folder")
        tasks = []
        for sequence in self._sequences():
            clips = self._clips(sequence)
            for part, first in enumerate(range(0, len(clips), PAIRS_PER_TASK)):
                mine = clips[first : first + PAIRS_PER_TASK]
                name = f"{re.sub(r'[^A-Za-z0-9_-]', '_', sequence)}-{part:04d}"
                tasks.append(SourceTask(name, len(mine), {"sequence": sequence, "clips": mine, "first": first}))
        if not tasks:
            raise InputError(
                f"{self.root} holds no clips; it needs event_image/<seq>/<clip>_0.png … or "
                "event_npy/<seq>/<clip>.npy, and video/<seq>/<clip>/*.png"
            )
        return tasks

    def pairs(self, task: SourceTask) -> Iterator[RawPair | Rejected]:
        """The task's clips in order; each that cannot be read costs itself alone."""
        sequence = task.spec["sequence"]
        for number, clip in enumerate(task.spec["clips"]):
            try:
                yield self._pair(sequence, clip, task.spec["first"] + number)
            except InputError as error:
                yield Rejected(f"{sequence}/{clip}", f"clip {clip}", str(error))

    def _pair(self, sequence: str, clip: str, number: int) -> RawPair:
        event_HWC, t_start_us = self._event_side(sequence, clip)
        if t_start_us is None:  # nominal: clips follow each other by `step`
            t_start_us = (int(clip) if clip.isdigit() else number) * self.step_us
        folder = self.root / "video" / sequence / clip
        frames = images_in(folder) if folder.is_dir() else []
        if not frames:
            raise InputError(f"{folder} holds no frame")
        return RawPair(
            sequence, t_start_us, t_start_us + self.duration_us, event_HWC, read_image(frames[len(frames) // 2])
        )

    def _event_side(self, sequence: str, clip: str) -> tuple[NDArray[np.uint8], int | None]:
        """(middle event image, start of the clip where its recording tells it)"""
        npy = self.root / "event_npy" / sequence / f"{clip}.npy"
        image = self.root / "event_image" / sequence / f"{clip}_{NUM_IMAGES // 2}.png"
        if image.exists():
            return read_image(image), None
        if not npy.exists():
            raise InputError(f"{image} is missing, and so is {npy}")
        content = read_npy(npy)
        events = events_of(content, *SENSOR, str(npy))
        start = content.get("time_start")
        middle = event_image(equal_counts(events, NUM_IMAGES)[NUM_IMAGES // 2])
        return middle, int(start) if isinstance(start, int | np.integer) else None

    def _sequences(self) -> list[str]:
        folders = [self.root / kind for kind in ("event_image", "event_npy", "video")]
        return sorted({p.name for folder in folders if folder.is_dir() for p in folder.iterdir() if p.is_dir()})

    def _clips(self, sequence: str) -> list[str]:
        """Clips that any of the three folders knows of, in order: what one of them lacks is found out later."""
        image = [re.sub(r"_\d+$", "", p.stem) for p in self._files("event_image", sequence) if p.suffix == ".png"]
        npy = [p.stem for p in self._files("event_npy", sequence) if p.suffix == ".npy"]
        video = [p.name for p in self._files("video", sequence) if p.is_dir()]
        return sorted({*image, *npy, *video}, key=lambda clip: natural(Path(clip)))

    def _files(self, kind: str, sequence: str) -> list[Path]:
        folder = self.root / kind / sequence
        return list(folder.iterdir()) if folder.is_dir() else []

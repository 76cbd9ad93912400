"""DSEC: recorded events and frames of real drives, cut into windows straight from the recordings.

Windows and their pairs are those of sources/recorded.py. Only what is drawn is read, once for all durations of a
task: places come from the file's millisecond index, and parts are drawn piece by piece (sources/sweep.py), so that a
window of 20 s and 300 million events takes no more memory than one of 50 ms.

With `align: far-field` the frame is drawn as the event camera sees it (events/views.py), and both sides are cut to
what both cameras see; with `none`, as in the reference, both stay whole and show different parts of the scene.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import ConfigError, InputError
from ray_app.events.windows import Window, format_duration
from ray_app.parsing.text import printable
from ray_app.sources.base import RawPair, RejectedPair, SourceTask, file_identity, require_visible
from ray_app.sources.dsec.events_file import DsecEvents
from ray_app.sources.dsec.layout import DsecSequence, find_sequences, sequence_in
from ray_app.sources.recorded import WindowingConfig, by_middle

WindowRounding = Literal["us", "ms"]
Align = Literal["far-field", "none"]
AskedAlign = Literal["auto", "far-field", "none"]
FRAMES_KEPT = 4
"""Decoded frames that the next windows may share: up to 5 MB each."""


@dataclass(frozen=True)
class DsecSource:
    """Windows of every sequence of a dataset folder, from its first image time on, at each duration."""

    root: Path
    """Dataset folder."""
    cut: WindowingConfig
    """Window lengths, and what of them is drawn."""
    window_rounding: WindowRounding = "us"
    """`us`: to the microsecond; `ms`: brought down to whole milliseconds of the file's clock, as EventGPT."""
    align: AskedAlign = "auto"
    """`auto`: `far-field` where sequences have a calibration, else `none`."""

    name = "dsec"

    def __post_init__(self) -> None:
        """ConfigError: settings that do not fit together."""
        for duration_us in self.cut.durations_us:
            if self.window_rounding == "ms" and duration_us % 1000:
                name = format_duration(duration_us)
                raise ConfigError(f"--durations ({name}) must be whole milliseconds with --window-rounding ms")

    def describe(self) -> dict[str, Any]:
        sequences = self._sequences()
        align = self._alignment(sequences)
        cut = self.cut.describe()
        return {
            "root": self.root.name,
            "sequences": [_identity(sequence, align) for sequence in sequences],
            "window_rounding": self.window_rounding,
            "align": align,
            **cut,
            **(_cut_alike(cut) if align == "far-field" else {}),
        }

    def durations(self) -> list[str]:
        return self.cut.names()

    def tasks(self) -> list[SourceTask]:
        """Up to 64 pairs and 64 s of windows of one sequence each, of all durations.

        InputError: a folder without sequences, a sequence with a part that is missing or damaged as a whole, or no
        window of a duration anywhere.
        """
        sequences = self._sequences()
        align = self._alignment(sequences)
        tasks: list[SourceTask] = []
        for sequence in sequences:
            times_us = sequence.times_us()
            with DsecEvents(sequence.events) as events:  # damaged as a whole: said before hours of work, not after
                _check_clocks(sequence, events, times_us)
            if align == "far-field":
                sequence.view()
            spec = {
                "folder": str(sequence.folder.relative_to(self.root)),
                "events": str(sequence.events.relative_to(self.root)),
                "sequence": sequence.name,
                "align": align,
            }
            portions = self.cut.portions(int(times_us[0]), int(times_us[-1]), by_middle)
            tasks += [self.cut.task(sequence.name, part, windows, spec) for part, windows in enumerate(portions)]
        if name := self.cut.without_windows(tasks):
            raise InputError(
                f"no sequence of {self.root} is long enough for a window of {name}; take shorter --durations"
            )
        return sorted(tasks, key=lambda task: task.name)

    def pairs(self, task: SourceTask) -> Iterator[RawPair | RejectedPair]:
        """Return the task's pairs in order of their windows' middles, in one sweep over the recording."""
        spec = task.spec
        require_visible(self.root)
        require_visible(self.root / spec["events"])
        sequence = sequence_in(self.root / spec["folder"], spec["sequence"])
        view = sequence.view() if spec["align"] == "far-field" else None

        @lru_cache(FRAMES_KEPT)
        def target(number: int) -> NDArray[np.uint8]:
            frame = sequence.frame(number)
            return frame if view is None else view.target(frame)

        def sides(drawn: NDArray[np.uint8], number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
            return drawn if view is None else view.crop.of(drawn), target(number)

        with DsecEvents(sequence.events) as events:
            windows = [self._bounded(Window(*ends), events.t_offset_us) for ends in spec["windows"]]
            yield from self.cut.pairs(sequence.name, events, sequence.times_us(), windows, sides)

    def _bounded(self, window: Window, t_offset_us: int) -> Window:
        """Return the window by `window_rounding`; its length is the same, for it is whole milliseconds if rounded."""
        early_us = (window.t_start_us - t_offset_us) % 1000 if self.window_rounding == "ms" else 0
        return Window(window.t_start_us - early_us, window.t_end_us - early_us)

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
        """Return the alignment that --align asks for, or that the sequences allow; the same for all of them."""
        lacking = [sequence.name for sequence in sequences if sequence.calibration is None]
        if self.align == "none" or (self.align == "auto" and len(lacking) == len(sequences)):
            return "none"
        if lacking:
            raise InputError(
                f"{len(lacking)} of {len(sequences)} sequences have no calibration/cam_to_cam.yaml, '{lacking[0]}' "
                "for instance; add it, or take --align none for all"
            )
        return "far-field"


def _identity(sequence: DsecSequence, align: Align) -> dict[str, Any]:
    """Return the facts that identify a recording in the manifest."""
    with DsecEvents(sequence.events) as events:
        identity = {
            "sequence": sequence.name,
            "events": len(events),
            "t_offset_us": events.t_offset_us,
            "frames": len(sequence.times_us()),
        }
    if sequence.calibration and align == "far-field":
        view = sequence.view()
        identity |= {
            "calibration_sha256": file_identity(sequence.calibration)["sha256"],
            "rectify_map_sha256": file_identity(sequence.rectify_map())["sha256"],
            "crop": asdict(view.crop),
            "event_view_without_frame": round(1 - float(view.valid_HW.mean()), 6),
        }
    return identity


def _cut_alike(cut: dict[str, Any]) -> dict[str, str]:
    """Describe in words how alignment changes the two pictures."""
    return {
        "event_image": f"{cut['event_image']}, cut to the crop of its sequence, which both cameras see",
        "target": f"{cut['target']}, as the event camera sees it, cut alike",
    }


def _check_clocks(sequence: DsecSequence, events: DsecEvents, times_us: NDArray[np.int64]) -> None:
    first_us, last_us = events.time_us(0), events.time_us(len(events) - 1)
    if times_us[-1] < first_us or times_us[0] > last_us:
        raise InputError(
            f"sequence '{sequence.name}': its images are from {times_us[0]} to {times_us[-1]} µs, its events from "
            f"{first_us} to {last_us} µs ({sequence.events} has a t_offset of {events.t_offset_us} µs): no window "
            "has both; are the files of one drive, and is t_offset right?"
        )


def _check_name(name: str) -> None:
    if printable(name) != name:
        raise InputError(f"the sequence's name {name!r} is no valid text (UTF-8); rename the folder")

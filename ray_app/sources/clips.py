"""Windows of real footage as a video model sees them: a few frames, evenly spread.

A video file is read by its frames' own times; a folder of frames by the numbers in their names and `fps`.
Shapes: T = frames of a clip, H, W = pixels as recorded, C = 3 colours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import InputError
from ray_app.events.windows import Window, format_duration, windows_between
from ray_app.sources.base import RejectedPair, named_sequences
from ray_app.sources.video import frame_times, frames
from ray_app.sources.video_decoder import Frame


@dataclass(frozen=True, slots=True)
class ClipWindow:
    """One window of a video, and the frames to look at."""

    row: int
    """Place among all windows of all videos."""
    sequence: str
    """Name of the video."""
    path: Path
    """The video."""
    window: Window
    """Its time in the video."""
    frames: tuple[int, ...]
    """Numbers of its frames, T of them; a window with fewer repeats some, one with none has the frame before it."""
    unusable: str = ""
    """Reason why the video has no window: then this is all that there is of it."""


@dataclass(frozen=True, slots=True)
class Clip:
    """Frames that a model sees."""

    source: ClipWindow
    """Window of the frames."""
    frames_THWC: NDArray[np.uint8]
    """The frames, RGB."""


def clip_windows(
    files: Sequence[Path], *, duration_us: int, step_us: int, num_frames: int, fps: float | None
) -> list[ClipWindow]:
    """Every window of every video, in order of time, and one for a video that has none. InputError: none has any."""
    found: list[ClipWindow] = []
    for sequence, path in named_sequences(files):
        try:
            times_us = np.asarray(frame_times(path, fps))
            windows = _windows(path, times_us, duration_us, step_us)
        except InputError as error:
            found.append(ClipWindow(len(found), sequence, path, Window(0, 0), (), str(error)))
            continue
        for window in windows:
            low, high = np.searchsorted(times_us, [window.t_start_us, window.t_end_us]).tolist()
            low = low if low < high else max(low - 1, 0)
            inside = max(high - low, 1)
            chosen = tuple(low + n * inside // num_frames for n in range(num_frames))
            found.append(ClipWindow(len(found), sequence, path, window, chosen))
    if all(window.unusable for window in found):
        raise InputError(found[0].unusable if found else "no video is named")
    return found


def _windows(path: Path, times_us: NDArray[np.int64], duration_us: int, step_us: int) -> list[Window]:
    """Return the windows of a video. InputError: it is shorter than one."""
    gap_us = int(np.median(np.diff(times_us))) if len(times_us) > 1 else 0
    windows = windows_between(int(times_us[0]), int(times_us[-1]) + gap_us, duration_us, step_us)
    if not windows:
        length_s = (times_us[-1] + gap_us - times_us[0]) / 1e6
        raise InputError(
            f"{path} has {len(times_us)} frames in {length_s:.3f} s, too short for a window of "
            f"{format_duration(duration_us)}; take a shorter --duration."
        )
    return windows


def clips(windows: Sequence[ClipWindow]) -> Iterator[Clip | RejectedPair]:
    """Yield the windows' frames, of one video in order of time; a window that lacks one is rejected alone."""
    path = windows[0].path
    if windows[0].unusable:
        yield RejectedPair(str(path), "the whole video", windows[0].unusable)
        return
    first, last = windows[0].frames[0], max(window.frames[-1] for window in windows)
    wanted = {number for window in windows for number in window.frames}
    seen: dict[int, Frame | str] = {}
    pending = list(windows)
    for number, frame in frames(path, first, last + 1):
        if number in wanted:
            seen[number] = frame
        while pending and number >= pending[0].frames[-1]:
            yield _read_clip(pending.pop(0), seen)
            for old in [n for n in seen if pending and n < pending[0].frames[0]]:
                del seen[old]
    for window in pending:
        yield _read_clip(window, seen)


def _read_clip(window: ClipWindow, seen: dict[int, Frame | str]) -> Clip | RejectedPair:
    found = [seen.get(number, f"frame {number} cannot be decoded") for number in window.frames]
    good = [frame for frame in found if not isinstance(frame, str)]
    flaws = [frame for frame in found if isinstance(frame, str)]
    if sizes := {frame.shape for frame in good if frame.shape != good[0].shape}:
        flaws.append(f"its frames have several sizes: {good[0].shape} and {sizes.pop()}")
    if flaws:
        start, end = window.window.t_start_us, window.window.t_end_us
        return RejectedPair(str(window.path), f"row {window.row}, window [{start}, {end})", flaws[0])
    return Clip(window, np.stack(good))

"""When each frame of a video file is shown, and where decoding can begin: from its packets, without decoding.

A container's times are used where they can be trusted: each packet has one, no two the same, and frames of a later
key frame are shown after those of an earlier one. Else frames are counted, in the order in which they are shown: AVI
knows no order but that of decoding, many a program stream and every raw stream no times at all.

Shapes: P = packets of the track in the order of the file, N = frames shown, G = groups, each a key packet and those
up to the next one.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream
from numpy.typing import NDArray

from ray_app.errors import InputError
from ray_app.events.recording import LATEST_US

CONTAINERS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "mxf", "dv", "gif", "apng", "ivf"),
    *("h264", "hevc", "obu", "mpegvideo", "m4v", "yuv4mpegpipe"),
)
"""Formats that are opened, as FFmpeg names them: none of them is a list of other files, as HLS is."""
NO_FRAMES = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
"""Tracks that a player does not show as a video: covers and thumbnails."""
BROADCAST = ("mpegts", "mpeg")
"""Formats without a list of their frames: one whose beginning is damaged vanishes, and decoders fill in for it."""
LOST_GAP = 1.5
"""Usual intervals from one frame to the next in such a format from which on one between them was lost."""
FEW_LOST = 0.05
"""Share of gaps above which they are no losses, but the way in which the video was taken."""
HIGHEST_RATE = 100_000
"""Frames a second, as for --fps: each needs a microsecond of its own."""
HIDDEN = -1
"""Number of a packet whose frame is never shown."""

Mark = tuple[int | None, int]
"""Time and size, by which a packet is found again after a seek."""


@dataclass(frozen=True, slots=True)
class VideoIndex:
    """Frames and packets of one track."""

    times_us: tuple[int, ...]
    """When each of the N frames is shown, counted from the first one; strictly rising."""
    trusted: bool
    """True if the times are the container's: then it is known of each packet which frame it holds."""
    shown_P: NDArray[np.bool_]
    """False for packets whose frame is never shown: cut away by an edit list, or before the first key frame."""
    numbers_P: NDArray[np.int64]
    """Number of each packet's frame in the order shown, if trusted; HIDDEN where it is not shown."""
    leading_P: NDArray[np.bool_]
    """True, if trusted, for frames that are shown before their group's key frame: they build on the group before."""
    keys_G: NDArray[np.int64]
    """Place of each group's key packet."""
    first_G: NDArray[np.int64]
    """Number of frames shown in the groups before, which is that of a group's first frame."""
    seeks_G: tuple[int | None, ...]
    """Times by which containers find the groups."""
    sizes_P: tuple[int, ...]
    """Bytes of each packet."""
    marks: dict[Mark, int]
    """Places of the key packets that can be distinguished from all others."""
    losses: dict[int, int]
    """Groups that lost a frame on the way, each with the number of the frame before it."""

    def group(self, place: int) -> int:
        """Return the group of a packet."""
        return int(np.searchsorted(self.keys_G, place, side="right")) - 1

    def group_of_frame(self, number: int) -> int:
        """Return the group whose packets hold a frame."""
        if self.trusted:
            return self.group(self._place(number))
        return int(np.searchsorted(self.first_G, number, side="right")) - 1

    def start_for(self, number: int) -> int:
        """Return the group at which decoding begins so that the frame comes out.

        Where frames are counted it is not known which are leading, and these would be missing from the count.
        """
        early = self.leading_P[self._place(number)] if self.trusted else True
        return max(self.group_of_frame(number) - int(early), 0)

    def _place(self, number: int) -> int:
        return int(np.flatnonzero(self.numbers_P == number)[0])


def open_video(path: Path) -> InputContainer:
    """Open a video file of a known kind. InputError: no such file, or none of them."""
    try:
        return av.open(str(path), options={"format_whitelist": ",".join(CONTAINERS)})
    except av.error.ArgumentError as error:  # of a demuxer that is not on the list
        raise InputError(f"{path} is no readable video: its format is not opened here") from error
    except FFmpegError as error:
        said: Any = error.log  # (level, where, what)
        why = f"{error.strerror} ({said[2].strip()})" if said else error.strerror
        raise InputError(f"{path} is no readable video: {why}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no readable video: {error}") from error


def track_of(container: InputContainer, path: Path) -> VideoStream:
    """Return the track that a player shows. InputError: there is none that can be decoded."""
    tracks = [stream for stream in container.streams.video if not stream.disposition & NO_FRAMES]
    tracks = [stream for stream in tracks if stream.frames != 1] or tracks  # a cover that is not called one
    if not tracks:
        raise InputError(f"{path} has no video stream" + (", only a picture" if container.streams.video else ""))
    try:
        best = container.streams.best("video")
    except IndexError:  # it was found while the streams were looked at, and has no place among them
        best = None
    track = best if best in tracks else max(tracks, key=lambda stream: stream.width * stream.height)
    if track.codec_context is None:
        raise InputError(f"{path}: its video is of a codec that cannot be decoded here; convert it to H.264, say")
    return track


def packets(container: InputContainer, track: VideoStream) -> Iterator[av.Packet]:
    """Yield the track's packets from where the container is; ends where it breaks off."""
    try:
        for packet in container.demux(track):
            if packet.size:
                yield packet
    except (FFmpegError, OSError, IndexError):  # IndexError: PyAV at the end of a file in which streams came up late
        return


def mark_of(packet: av.Packet) -> Mark:
    return packet.pts, packet.size


def read_index(path: Path) -> VideoIndex:
    """Return a video's index. InputError: no readable video, or one without a frame or a rate."""
    try:
        state = path.stat()
    except OSError as error:
        raise InputError(f"{path} is no readable video: {error.strerror}") from error
    return _read_index(path, (state.st_size, state.st_mtime_ns))


@lru_cache(8)
def _read_index(path: Path, _version: tuple[int, int]) -> VideoIndex:
    """Read a whole file; several tasks of one process need the same."""
    with open_video(path) as container:
        track = track_of(container, path)
        rows = [(p.pts, p.dts, p.size, p.is_keyframe, p.is_discard) for p in packets(container, track)]
        reorders, base, rate = track.codec_context.has_b_frames, track.time_base, track.average_rate
        broadcast = container.format.name in BROADCAST
    if not rows:
        raise InputError(f"{path} holds no frame")
    pts, dts, sizes, is_key, is_discard = zip(*rows, strict=True)
    places = np.arange(len(rows))
    keys_G = np.flatnonzero(is_key) if any(is_key) else places[:1]
    group_P = np.searchsorted(keys_G, places, side="right") - 1
    shown_P = ~np.array(is_discard) & (group_P >= 0)  # a frame before the first key frame builds on what is not there
    stamps = [pts[i] for i in np.flatnonzero(shown_P)]
    rising = _rise(stamps)
    numbers_P, leading_P = np.full(len(rows), HIDDEN), np.zeros(len(rows), bool)
    trusted = None not in stamps and len(set(stamps)) == len(stamps) and not (rising and reorders)
    if trusted:
        pts_P = np.array([0 if stamp is None else stamp for stamp in pts], np.int64)
        in_order = np.flatnonzero(shown_P)[np.argsort(pts_P[shown_P], kind="stable")]
        trusted = bool((np.diff(group_P[in_order]) >= 0).all())
    if trusted:
        leading_P = pts_P < pts_P[keys_G][group_P]
        shown_P &= ~leading_P | (group_P > 0)
        in_order = in_order[shown_P[in_order]]
        numbers_P[in_order] = np.arange(len(in_order))
        stamps = pts_P[in_order].tolist()
    else:  # the n-th frame that is shown, at the n-th time at which one is decoded
        decoded = [dts[i] for i in np.flatnonzero(shown_P)]
        stamps = next((each for each in (decoded, stamps) if _rise(each)), [])
    if not shown_P.any():
        raise InputError(f"{path} holds no frame")
    losses: dict[int, int] = {}
    if trusted and broadcast:
        losses = {int(group_P[in_order[number]]): number for number in _lost_after(stamps)}
    marks = Counter(zip(pts, sizes, strict=True))
    return VideoIndex(
        times_us=_times_us(stamps, base) or _counted_us(int(shown_P.sum()), rate, path),
        trusted=trusted,
        shown_P=shown_P,
        numbers_P=numbers_P,
        leading_P=leading_P,
        keys_G=keys_G,
        first_G=(np.cumsum(shown_P) - shown_P)[keys_G],
        seeks_G=tuple(pts[i] if dts[i] is None else dts[i] for i in keys_G),
        sizes_P=sizes,
        marks={mark: int(i) for i in keys_G if marks[mark := (pts[i], sizes[i])] == 1 and pts[i] is not None},
        losses=losses,
    )


def _rise(stamps: Sequence[int | None]) -> bool:
    return None not in stamps and all(a < b for a, b in pairwise(stamps))  # type: ignore[operator]


def _lost_after(stamps: list[int]) -> list[int]:
    """Return the numbers of the frames behind which one was lost."""
    gaps = np.diff(stamps)
    wide = np.flatnonzero(gaps > LOST_GAP * np.median(gaps)) if len(gaps) else gaps
    return wide.tolist() if len(wide) <= FEW_LOST * len(stamps) else []


def _times_us(stamps: list[int], base: Fraction | None) -> tuple[int, ...]:
    """Return microseconds from the first stamp on, or nothing if they do not rise strictly or cannot be such."""
    times_us = tuple(round((stamp - stamps[0]) * base * 1_000_000) for stamp in stamps) if base else ()
    sound = all(a < b for a, b in pairwise(times_us)) and max(times_us, default=0) < LATEST_US
    return times_us if sound else ()


def _counted_us(count: int, rate: Fraction | None, path: Path) -> tuple[int, ...]:
    """Return the times of so many frames at a rate. InputError: it is not known, or cannot be one."""
    if not rate or not 0 < rate <= HIGHEST_RATE:
        raise InputError(
            f"{path} has neither the times of its frames nor their rate (it says {rate or 0} a second); "
            "convert it to MP4"
        )
    return tuple(round(i * 1_000_000 / rate) for i in range(count))

"""Frames of a video file in the order in which they are shown, upright, each with its number or the reason it lacks.

Every packet is given its place as its time before it is decoded: a frame then shows which packet it comes from,
whatever the container says. Damage costs the frames that may build on it, up to the next key frame, and no more.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.sidedata.sidedata import Type
from av.video.stream import VideoStream
from numpy.typing import NDArray

from ray_app.sources.video_index import VideoIndex, mark_of, open_video, packets, read_index, track_of

MOST_WAITING = 16
"""Frames that a codec can hold back for reordering: the limit of H.264 and HEVC."""
GROUPS_BACK = (0, 1, 4)
"""A seek that lands behind its key frame is tried again for one so many groups earlier, then the file read from its
beginning."""

Frame = NDArray[np.uint8]
"""(H, W, 3) RGB."""
Matrix = NDArray[np.int32]
"""A display matrix: a b u, c d v, x y w."""


def video_frames(path: Path, first: int, stop: int) -> Iterator[tuple[int, Frame | str]]:
    """Yield (number, picture, or the reason why there is none) of frames [first, stop) of a video file.

    If the first one does not come out, decoding begins once more one key frame earlier: from some key frames pictures
    recover only little by little.
    """
    index = read_index(path)
    group = index.start_for(first)
    for begin in dict.fromkeys((group, max(group - 1, 0))):
        decoding = _Decoding(path, index, begin)
        found = (item for item in decoding.frames() if item[0] >= first)
        head = next(found, None)
        if head and head[0] == first and not isinstance(head[1], str):
            break
    expected, matrices = first, dict[int, Matrix | None]()
    for number, picture in chain([head] if head else [], found):
        for missing in range(expected, min(number, stop)):
            yield missing, decoding.why_missing(missing)
        if number >= stop:
            return
        if number >= expected:
            yield number, picture if isinstance(picture, str) else _picture(picture, matrices)
        expected = max(expected, number + 1)
    for missing in range(expected, stop):
        yield missing, decoding.why_missing(missing)


@dataclass(frozen=True, slots=True)
class _Decoded:
    """A frame as it came out of the decoder."""

    frame: av.VideoFrame
    """The frame."""
    place: int
    """Place of its packet."""
    number: int
    """Its number in the order shown."""
    leading: bool
    """True if it came before its group's key frame: it may build on the group before."""


class _Decoding:
    """One run of the decoder, from a group's key packet on."""

    def __init__(self, path: Path, index: VideoIndex, group: int) -> None:
        self._path, self._index, self._group = path, index, group
        self._spoiled = {
            lossy: (
                int(index.keys_G[lossy]),
                f"behind frame {number} one is missing; others of its group may build on it",
            )
            for lossy, number in index.losses.items()
        }
        """Place of the first damaged packet of a group, and what is wrong with it."""
        self._open = int(index.keys_G[group])
        """Place of the first packet that is not accounted for: of those before, frames came or none will."""
        self._accounted: set[int] = set()
        """Places behind it that are."""
        self._waiting: deque[_Decoded] = deque()
        """Frames in the order shown, until all packets before theirs are accounted for."""
        self._newest = (-1, -1)
        """Place and number of the newest frame."""

    def frames(self) -> Iterator[tuple[int, av.VideoFrame | str]]:
        """Yield (number, frame or reason) in the order shown; numbers can be missing."""
        for track, place, packet in _packets_from(self._path, self._index, self._group):
            for frame in self._decode(track, place, packet):
                self._take(frame)
            yield from self._released(ended=packet is None)

    def why_missing(self, number: int) -> str:
        """Return the reason why a frame did not come out."""
        group = self._index.group_of_frame(number)
        spoiled = self._spoiled.get(group) or self._spoiled.get(group - 1)
        return spoiled[1] if spoiled else f"frame {number} does not come out of the decoder"

    def _decode(self, track: VideoStream, place: int, packet: av.Packet | None) -> list[av.VideoFrame]:
        """Decode a packet, or with None what the decoder holds back."""
        if packet is not None:
            packet.pts = place
            if packet.is_corrupt:
                self._spoil(place, "it is incomplete in the file")
            if packet.size != self._index.sizes_P[place]:
                self._spoil(place, "it is another one where reading begins elsewhere")
            if self._index.leading_P[place] and self._index.group(place) == self._group:
                self._accounted.add(place)  # it builds on the group before the first that is decoded
                return []
        try:
            return track.decode(packet)
        except (FFmpegError, EOFError) as error:
            if packet is not None:
                self._spoil(place, getattr(error, "strerror", None) or str(error))
                self._accounted.add(place)
            return []

    def _take(self, frame: av.VideoFrame) -> None:
        if frame.pts is None:
            return  # of no packet that is known
        place, index = frame.pts, self._index
        group = index.group(place)
        key = int(index.keys_G[group])
        leading = place != key and not self._is_accounted(key)
        number = int(index.numbers_P[place])
        if not index.trusted:
            before, count = self._newest
            number = count + 1 if index.group(before) == group else int(index.first_G[group])
        if frame.is_corrupt:
            self._spoil(place, "it decodes with errors")
        self._accounted.add(place)
        self._newest = place, number
        self._waiting.append(_Decoded(frame, place, number, leading))

    def _released(self, ended: bool) -> Iterator[tuple[int, av.VideoFrame | str]]:
        """Yield frames as soon as all packets on which they may build are accounted for."""
        while self._waiting:
            decoded = self._waiting[0]
            while self._open < decoded.place and self._is_accounted(self._open):
                self._accounted.discard(self._open)
                self._open += 1
            if self._open >= decoded.place:
                self._waiting.popleft()
                yield decoded.number, self._flaw(decoded) or decoded.frame
            elif ended or self._is_lost(self._open):
                self._spoil(self._open, "it gives no picture")
                self._accounted.add(self._open)
            else:
                return

    def _is_accounted(self, place: int) -> bool:
        return place < self._open or place in self._accounted or not self._index.shown_P[place]

    def _is_lost(self, place: int) -> bool:
        """True if frames came out that are shown later than this packet's."""
        newest, number = self._newest
        if self._index.trusted:
            return bool(self._index.numbers_P[place] < number)
        return self._index.group(place) < self._index.group(newest) or len(self._waiting) > MOST_WAITING

    def _flaw(self, decoded: _Decoded) -> str:
        """Return what is wrong with what a frame may build on. Where frames are counted, a lost one moves all."""
        group = self._index.group(decoded.place)
        place, why = self._spoiled.get(group, (0, ""))
        if why and (place <= decoded.place or not self._index.trusted):
            return why
        return self._spoiled.get(group - 1, (0, ""))[1] if decoded.leading else ""

    def _spoil(self, place: int, what: str) -> None:
        """Note damage; of a group's the first counts."""
        index = self._index
        group = index.group(place)
        number = int(index.numbers_P[place])
        name = f"frame {number}" if number >= 0 else f"packet {place} of the video"
        alone = group + 1 < len(index.keys_G) and index.keys_G[group + 1] == index.keys_G[group] + 1
        why = f"{name} is damaged: {what}" + ("" if alone else "; frames up to the next key frame may build on it")
        self._spoiled[group] = min(self._spoiled.get(group, (place, why)), (place, why))


def _packets_from(path: Path, index: VideoIndex, group: int) -> Iterator[tuple[VideoStream, int, av.Packet | None]]:
    """Yield (track, place, packet) from a group's key packet on; at the end the place after the last, and None.

    Containers seek as they can: MPEG-TS may land behind what was asked for. Where it landed is known from the first
    key packet that is in the index.
    """
    start = int(index.keys_G[group])
    for target in dict.fromkeys((*(group - back for back in GROUPS_BACK if back < group), 0)):
        with open_video(path) as container:
            track = track_of(container, path)
            track.thread_count = 1  # Ray runs one task for each core
            begin, found = _sought(container, track, index, target) if target else (0, packets(container, track))
            if begin > start:
                continue
            for place, packet in zip(range(begin, len(index.sizes_P)), found, strict=False):
                if place >= start:
                    yield track, place, packet
            yield track, len(index.sizes_P), None
            return


def _sought(
    container: InputContainer, track: VideoStream, index: VideoIndex, group: int
) -> tuple[int, Iterable[av.Packet]]:
    """Return the place at which a seek for a group arrived, the end if that is not known, and the packets there."""
    nowhere = len(index.sizes_P), ()
    time = index.seeks_G[group]
    if time is None:
        return nowhere
    try:
        container.seek(time, stream=track)
    except (FFmpegError, OSError):
        return nowhere
    found = packets(container, track)
    for packet in found:
        if (place := index.marks.get(mark_of(packet))) is not None:
            return place, chain([packet], found)
    return nowhere


def _picture(frame: av.VideoFrame, matrices: dict[int, Matrix | None]) -> Frame | str:
    """Return a frame as it is shown: RGB of 8 bits, transparency over white, turned by its display matrix.

    `matrices` keeps those seen so far by their rotation: to read one takes longer than to decode a frame.
    """
    see_through = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    try:
        image = np.asarray(frame.to_ndarray(format="rgba" if see_through else "rgb24"), np.uint8)
    except (FFmpegError, ValueError) as error:
        return f"its pixels of format {frame.format.name} cannot be converted: {error}"
    if see_through:
        alpha = image[..., 3:].astype(np.uint16)
        image = ((image[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    if frame.rotation not in matrices:
        side_data: Any = frame.side_data
        matrix = side_data.get(Type.DISPLAYMATRIX)
        matrices[frame.rotation] = None if matrix is None else np.frombuffer(bytes(matrix), np.int32)
    found = matrices[frame.rotation]
    return np.ascontiguousarray(image if found is None else _upright(image, found))


def _upright(image: Frame, matrix: Matrix) -> Frame:
    """Turn by quarters and mirror: a pixel at (x, y) is shown at (a x + c y, b x + d y)."""
    a, b, _, c, d = matrix[:5].astype(np.int64).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        image, a, d = image.transpose(1, 0, 2), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]

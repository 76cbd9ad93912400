"""Small made-up videos of many codecs and containers, with pictures that show their number."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition

from ray_app.sources.video_decoder import video_frames
from ray_app.sources.video_index import read_index

HEIGHT, WIDTH = 48, 64
MIXED_GOPS = {"x264-params": "keyint=12:bframes=3:b-adapt=0"}


def picture(number: int) -> np.ndarray:
    """A white square whose place is the number, up to 48; red in the upper left corner alone."""
    image = np.full((HEIGHT, WIDTH, 3), 30, np.uint8)
    row, column = divmod(number, 8)
    image[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 235
    image[:6, :6] = (235, 20, 20) if number else 235
    return image


ALL = np.stack([picture(number) for number in range(48)]).astype(np.int16)


def number_of(image: np.ndarray) -> int:
    """The number of the picture that looks most like it."""
    return int(np.abs(ALL - image.astype(np.int16)).mean(axis=(1, 2, 3)).argmin())


def write_video(
    path: Path,
    codec: str = "libx264",
    count: int = 40,
    *,
    container: str | None = None,
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    times_ms: Sequence[int] | None = None,
    rotation: tuple[float, bool, bool] | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> Path:
    """Pictures 0 to `count` - 1 at 25 a second, or at `times_ms`; key frames at least every 12."""
    with av.open(str(path), "w", format=container) as out:
        stream: Any = out.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.codec_context.gop_size = 12
        if codec in ("mpeg4", "mpeg2video", "mpeg1video"):
            stream.codec_context.max_b_frames = 2
        if times_ms:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation[0], hflip=rotation[1], vflip=rotation[2])
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            if times_ms:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def copied(source: Path, path: Path, *, cover: Disposition | None = None, decoding_order: bool = False) -> Path:
    """The coded frames of a video in another file, behind a cover picture, or with the times of their decoding."""
    with av.open(str(source)) as into, av.open(str(path), "w") as out:
        track = into.streams.video[0]
        if cover is not None:
            picture_track: Any = out.add_stream("mjpeg", rate=1)
            picture_track.width, picture_track.height, picture_track.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
            picture_track.disposition = cover
        copy = out.add_stream_from_template(track)
        if cover is not None:
            out.mux(picture_track.encode(av.VideoFrame.from_ndarray(picture(47), format="rgb24")))
            out.mux(picture_track.encode())
        for packet in into.demux(track):
            if packet.size:
                packet.pts = packet.dts if decoding_order else packet.pts
                packet.stream = copy
                out.mux(packet)
    return path


def zeroed(source: Path, path: Path, *places: int) -> Path:
    """A copy with zeros for the packets at these places."""
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        packets = [bytes(packet) for packet in container.demux(container.streams.video[0]) if packet.size]
    for place in places:
        at = data.find(packets[place])
        assert at >= 0, "the packet is in the file as it is"
        data[at : at + len(packets[place])] = bytes(len(packets[place]))
    path.write_bytes(data)
    return path


def seen(path: Path) -> list[int | str]:
    """The number that each frame's picture shows, or the reason for none."""
    frames = list(video_frames(path, 0, len(read_index(path).times_us)))
    assert [number for number, _ in frames] == list(range(len(frames)))
    return [frame if isinstance(frame, str) else number_of(frame) for _, frame in frames]

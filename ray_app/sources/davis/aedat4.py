"""AEDAT4 recordings, packet by packet, through the library `aedat` (an optional extra).

Damage can end the library's whole process. So a file is first decoded to its end in a process of its own, and only
one that came through is decoded where it is needed.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ray_app.errors import InputError
from ray_app.events.recording import Events

WIDEST = 4096
"""Rows and columns of a sensor; larger ones are a damaged header."""

RecordedFrame = dict[str, Any]
"""A frame as it is decoded: pixels, format, width, height, offset_x, offset_y and times."""


class Aedat4:
    """The packets of one file in order, checked: events and frames of one sensor, by one clock.

    InputError, with the file's name: no such recording, or one that breaks off or runs backwards.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.open("rb").close()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        self._decoder = self._decoded(lambda: _library().Decoder(path), "is no readable AEDAT4 recording")
        streams = self._decoded(self._decoder.id_to_stream, "is no readable AEDAT4 recording").values()
        for kind, what in (("events", "event"), ("frame", "frame")):
            count = sum(stream["type"] == kind for stream in streams)
            if count != 1:
                raise InputError(
                    f"{path} has {count} {what} streams; `prepare davis` needs one of events and one of frames, "
                    "of the same sensor"
                )
        sensor = next(stream for stream in streams if stream["type"] == "events")
        self.width, self.height = int(sensor["width"]), int(sensor["height"])
        if not (0 < self.width <= WIDEST and 0 < self.height <= WIDEST):
            raise InputError(f"{path} names a sensor of {self.width} x {self.height} pixels; its header is damaged")
        self.num_events = self.num_frames = 0
        self.events_until_us = self.frames_until_us = -(2**63)
        """Time of the last event and of the last frame so far."""

    def __iter__(self) -> Iterator[Events | tuple[int, RecordedFrame]]:
        """Events, or (time, frame as decoded), one packet after the other."""
        while True:
            packet = self._decoded(lambda: next(self._decoder, None), "is truncated or damaged")
            if packet is None:
                return
            if "events" in packet and len(packet["events"]):
                yield self._events(packet["events"])
            elif "frame" in packet:
                yield self._frame(packet["frame"])

    def _events(self, found: NDArray[Any]) -> Events:
        where = f"{self.path}, counted from event {self.num_events}"
        x, y, t, on = (found[name] for name in ("x", "y", "t", "on"))
        events = Events.checked(x, y, t, on, self.width, self.height, where)
        self._check_order("event", int(events.t_us[0]), self.events_until_us)
        self.num_events += len(events)
        self.events_until_us = int(events.t_us[-1])
        return events

    def _frame(self, found: RecordedFrame) -> tuple[int, RecordedFrame]:
        t_us = (found["exposure_begin_t"] + found["exposure_end_t"]) // 2
        self._check_order("frame", t_us, self.frames_until_us + 1)
        self.num_frames += 1
        self.frames_until_us = t_us
        return t_us, found

    def _check_order(self, what: str, t_us: int, earliest_us: int) -> None:
        if t_us < earliest_us:
            raise InputError(
                f"{self.path}: {what} times do not rise: {t_us} µs after {self._so_far()}; sort the recording by time"
            )

    def _decoded(self, read: Any, flaw: str) -> Any:
        try:
            return read()
        except BaseException as error:  # the decoder's own panics are no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.path} {flaw}: {error}{self._so_far(', after ')}") from error

    def _so_far(self, before: str = "") -> str:
        frames, events = getattr(self, "num_frames", 0), getattr(self, "num_events", 0)
        if not frames and not events:
            return ""
        until_us = max(self.events_until_us, self.frames_until_us)
        return f"{before}{events} events and {frames} frames, the last at {until_us} µs"


def frame_span(path: Path) -> tuple[int, int]:
    """Return the times of the first and the last frame. The whole file is decoded for it, in another process.

    InputError: see Aedat4; no frame, no event, or damage that ends the decoder.
    """
    _library()
    words = [sys.executable, "-m", "ray_app.sources.davis.aedat4", str(path)]
    surroundings = os.environ | {"PYTHONPATH": os.pathsep.join(word for word in sys.path if word)}
    done = subprocess.run(words, capture_output=True, env=surroundings, check=False)
    if done.returncode:
        raise InputError(
            f"{path} is truncated or damaged: the decoder broke down on it (exit code {done.returncode})"
        )
    said = json.loads(done.stdout)
    if "error" in said:
        raise InputError(said["error"])
    return said["first_us"], said["last_us"]


def decoded_to_the_end(path: Path) -> dict[str, Any]:
    """Return the times of the first and the last frame, or an error, as JSON values."""
    try:
        file = Aedat4(path)
        frames_us = [packet[0] for packet in file if not isinstance(packet, Events)]
        for count, what in ((len(frames_us), "frame"), (file.num_events, "event")):
            if not count:
                raise InputError(f"{path} holds no {what}; pairs need events and frames")
    except InputError as error:
        return {"error": str(error)}
    return {"first_us": frames_us[0], "last_us": frames_us[-1]}


def _library() -> Any:
    try:
        return importlib.import_module("aedat")
    except ImportError as error:
        raise InputError(
            "AEDAT4 recordings are decoded by the package `aedat`, which is not installed; "
            "`pip install 'ray-app[davis]'` brings it"
        ) from error


if __name__ == "__main__":
    print(json.dumps(decoded_to_the_end(Path(sys.argv[1]))))

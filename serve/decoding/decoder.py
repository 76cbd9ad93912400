"""The program of a decoder process: reads jobs from standard input, writes images to standard output.

It has no secret of its parent's, one thread, and bounds that the operating system holds: memory by the size of the
input, time by an alarm that ends the process.
"""

import resource
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ray_app.encoders.preprocessing import ImagePreprocessing
from ray_app.errors import InputError
from ray_app.events.render import equal_counts, event_image
from ray_app.sources.images import decode_image, resized_image
from ray_app.sources.npy import events_of
from ray_app.sources.npz import parse_recording

from .job import DecodeJob, read_message, write_message

NUM_IMAGES = 5
"""Event images per recording, by equal event count; the middle one is the event feature, or what is encoded."""
MAX_PIXELS = 2**22
"""Largest number of pixels of a picture or sensor, 4.2 million: one with transparency takes 16 bytes each, 64 MiB."""
ROOM_BYTES = 128 * 2**20
"""Address space of a job in addition to four times its input: twice the memory that decoding may take."""
ALARM_S = 30
"""A job that takes longer ends the process, also if its parent is gone."""


def decode(job: DecodeJob, data: bytes) -> NDArray[np.uint8]:
    """Return the images, (3 · num_images, height, width).

    InputError: unreadable, damaged, too large, or outside of the sensor.
    """
    return np.concatenate([fitted(image, job) for image in images(job, data)])


def images(job: DecodeJob, data: bytes) -> Iterator[Image.Image]:
    """Yield the images of a job in their own size."""
    if job.kind == "image":
        yield decode_image(data, f"the picture '{job.name}'", max_pixels=MAX_PIXELS)
        return
    what = "the recording"
    columns, rows = job.sensor
    if columns * rows > MAX_PIXELS:
        raise InputError(f"a sensor of {columns} x {rows} pixels is larger than the limit of {MAX_PIXELS:,}")
    events = events_of(parse_recording(data, what), columns, rows, what)
    if job.num_images > 1:
        yield from (Image.fromarray(event_image(part)) for part in equal_counts(events, job.num_images))
        return
    drawn = equal_counts(events, NUM_IMAGES)[NUM_IMAGES // 2] if job.middle else events
    yield Image.fromarray(event_image(drawn))


def fitted(image: Image.Image, job: DecodeJob) -> NDArray[np.uint8]:
    """Return an image as a feature of pixels, or the part of it that an encoder sees, (3, height, width)."""
    if job.steps is None:
        return resized_image(image, job.height, job.width)
    return ImagePreprocessing.of(job.steps).cut(np.asarray(image)).transpose(2, 0, 1)


def answer(job: DecodeJob, data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the image, or the sentence that says why there is none."""
    try:
        return {}, decode(job, data).tobytes()
    except InputError as error:
        return {"refused": str(error)}, b""
    except MemoryError:
        return {"refused": f"the {job.kind} takes more memory than {len(data):,} bytes may; make it smaller"}, b""


def bound_memory(num_bytes: int) -> None:
    """Let this process take so much address space beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    limit = pages * resource.getpagesize() + num_bytes
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def main() -> None:
    pipe_in, pipe_out = sys.stdin.buffer, sys.stdout.buffer
    warnings.simplefilter("ignore")  # of odd files there are many, and the log is the operator's
    write_message(pipe_out, {"ready": True})
    while True:
        try:
            head, data = read_message(pipe_in, sys.maxsize)
        except EOFError:
            return
        job = DecodeJob(**head)
        signal.alarm(ALARM_S)
        if sys.platform == "linux":
            bound_memory(4 * len(data) + ROOM_BYTES)
        write_message(pipe_out, *answer(job, data))
        signal.alarm(0)
        del data


if __name__ == "__main__":
    main()

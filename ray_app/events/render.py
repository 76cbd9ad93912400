"""Event images as EventGPT draws them: white canvas, blue for darker, red for brighter, the last event wins.

Shapes: N = events, H, W = sensor rows and columns. Source: generate_event_image and get_event_images_list of
EventGPT, which draw event by event in Python.
"""

from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import InputError
from ray_app.events.recording import Events

WHITE, BLUE, RED = 0xFFFFFFFF, 0xFFFF0000, 0xFF0000FF
"""Little-endian RGBA words; polarity 0 is blue (0, 0, 255), 1 is red (255, 0, 0)."""

Canvas = Literal["sensor", "bbox"]


def event_image(events: Events, canvas: Canvas = "sensor") -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB. `bbox`: only as many rows and columns as the largest y and x need, as EventGPT.

    One word for each event is assigned through a flat index. NumPy gives a repeated index the last of its
    values (NumPy user guide, "Assigning values to indexed arrays"), which is the rule of the last event.
    """
    height, width = events.height, events.width
    if canvas == "bbox":
        if not len(events):
            raise InputError("no events, so no bounding box to draw in; use canvas='sensor'")
        height, width = int(events.y.max()) + 1, int(events.x.max()) + 1
    words = np.full(height * width, WHITE, np.dtype("<u4"))
    flat = events.y.astype(np.int32) * np.int32(width) + events.x
    words[flat] = np.array([BLUE, RED], np.dtype("<u4"))[events.p]
    return np.ascontiguousarray(words.view(np.uint8).reshape(height, width, 4)[:, :, :3])


def event_images(events: Events, num_images: int, canvas: Canvas = "sensor") -> list[NDArray[np.uint8]]:
    """`num_images` images of equal event count; the remainder goes to the last. InputError: too few."""
    return [event_image(part, canvas) for part in equal_counts(events, num_images)]


def equal_counts(events: Events, num_parts: int) -> list[Events]:
    """Parts of equal event count in time order; the remainder goes to the last. InputError: too few."""
    if len(events) < num_parts:
        raise InputError(
            f"{len(events)} events cannot be drawn as {num_parts} images; at least one each is needed"
        )
    count = len(events) // num_parts
    bounds = [i * count for i in range(num_parts)] + [len(events)]
    return [events[slice(a, b)] for a, b in pairwise(bounds)]

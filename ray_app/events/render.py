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

COLOURS = np.array([[0, 0, 255], [255, 0, 0], [255, 255, 255]], np.uint8)
"""Colours of polarity 0, polarity 1, and of a pixel without an event."""
NO_EVENT = 2
ROUNDING = 3
"""Three colours, each rounded up to twice in a resize."""
DRAWN_AT_A_TIME = 2**16
"""Events at a time, so few that their indices stay in a processor's cache."""

CanvasSize = Literal["sensor", "bbox"]


def event_image(events: Events, canvas: CanvasSize = "sensor") -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB. `bbox`: only as many rows and columns as the largest y and x need, as EventGPT.

    One byte for each event is assigned through a flat index, then bytes become colours. NumPy gives a repeated
    index the last of its values (NumPy user guide, "Assigning values to indexed arrays"): the last event wins.
    """
    height, width = events.height, events.width
    if canvas == "bbox":
        if not len(events):
            raise InputError("no events, so no bounding box to draw in; use canvas='sensor'")
        height, width = int(events.y.max()) + 1, int(events.x.max()) + 1
    drawing = EventCanvas(width, height)
    drawing.add(events)
    return drawing.image()


class EventCanvas:
    """An event image in the making, drawn part by part: parts follow each other in time."""

    def __init__(self, width: int, height: int) -> None:
        self._shape = height, width
        self._last = np.full(height * width, NO_EVENT, np.uint8)

    def add(self, events: Events) -> None:
        """Draws events over what is there. They lie on the canvas: `Events` are checked."""
        for first in range(0, len(events), DRAWN_AT_A_TIME):
            part = slice(first, first + DRAWN_AT_A_TIME)
            flat = np.multiply(events.y[part], self._shape[1], dtype=np.intp)
            flat += events.x[part]
            self._last[flat] = events.p[part]

    def image(self) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB, a new array."""
        return np.take(COLOURS, self._last, axis=0, mode="clip").reshape(*self._shape, 3)


def equal_counts(events: Events, num_parts: int) -> list[Events]:
    """Parts of equal event count in time order; the remainder goes to the last. InputError: too few."""
    if len(events) < num_parts:
        raise InputError(f"{len(events)} events cannot be drawn as {num_parts} images; at least one each is needed")
    return drawn_parts(events, num_parts)


def drawn_parts(events: Events, num_parts: int) -> list[Events]:
    """Return parts as `equal_counts`; where there are too few events for it, all are in the last part."""
    count = len(events) // num_parts
    bounds = [*(count * i for i in range(num_parts)), len(events)]
    return [events[slice(a, b)] for a, b in pairwise(bounds)]


def drawn_shares(images_NCHW: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(share of pixels with an event, positive share of these), shape (N,) each, of event images after resizing.

    A bilinear resize mixes white, red and blue linearly and keeps means, so the means of the three colours give the
    shares of the picture as it was drawn: 1 − green, and red − green against blue − green. NaN where an image is
    none of these mixtures, red + blue − green being off 255 at some pixel by more than rounding; the positive share
    is NaN where no event was drawn too. Of a pixel with several events the last one counts.
    """
    red, green, blue = (images_NCHW[:, c].astype(np.int16) for c in range(3))
    drawn = np.abs(red + blue - green - 255).max(axis=(1, 2)) <= ROUNDING
    mean_3N = [colour.mean(axis=(1, 2)) / 255 for colour in (red, green, blue)]
    positive, negative = mean_3N[0] - mean_3N[1], mean_3N[2] - mean_3N[1]
    active = np.where(drawn, 1 - mean_3N[1], np.nan)
    either = np.where(drawn & (active > 0), positive + negative, np.nan)
    return active, np.where(either > 0, positive / np.where(either > 0, either, 1.0), np.nan)

"""One sweep over a recording draws many event images: what several of them need is read once.

An image is drawn from a slice [first, stop) of events by their places. Slices of overlapping windows and of several
durations overlap; each block of the recording that any of them needs is read once, checked once, and drawn into all
of them that are open.
"""

from collections import deque
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import InputError
from ray_app.events.recording import Events
from ray_app.events.render import EventCanvas

EVENTS_PER_BLOCK = 2**18
"""Most events that are asked for at a time."""

Slice = tuple[int, int]
"""[first, stop) of events by their places in order of time."""


class RecordedEvents(Protocol):
    """Events of one sensor by their places in order of time; times are microseconds of the recording's clock."""

    @property
    def width(self) -> int:
        """Sensor columns."""
        ...

    @property
    def height(self) -> int:
        """Sensor rows."""
        ...

    def index(self, t_us: int) -> int:
        """Return the number of events before `t_us`."""
        ...

    def parts(self, first: int, stop: int) -> Iterator[Events]:
        """Events [first, stop) in parts that are small enough to hold."""
        ...

    def silence(self, t_start_us: int, t_end_us: int, longest_us: int) -> tuple[int, int] | None:
        """Return the first stretch of [t_start_us, t_end_us) longer than `longest_us` without an event."""
        ...


class EventImageBuilder:
    """The event image of one slice, while it is drawn and when it is done."""

    def __init__(self, first: int, stop: int, width: int, height: int) -> None:
        self.first, self.stop = first, stop
        self.num_positive = 0
        """Positive events so far."""
        self.first_us = self.last_us = 0
        """Times of its first and its last event so far."""
        self.flaw: InputError | None = None
        """Reason why it cannot be drawn."""
        self._size = width, height
        self._drawing: EventCanvas | None = None

    def add(self, events: Events, place: int) -> None:
        """Draws those that belong to it of some events, the first of which has this place."""
        mine = events[max(self.first - place, 0) : max(self.stop - place, 0)]
        if not len(mine) or self.flaw:
            return
        if self._drawing is None:
            self._drawing, self.first_us = EventCanvas(*self._size), int(mine.t_us[0])
        self._drawing.add(mine)
        self.num_positive += int(np.count_nonzero(mine.p))
        self.last_us = int(mine.t_us[-1])

    def image(self) -> NDArray[np.uint8]:
        """(H, W, 3). InputError: some of its events cannot be read."""
        if self.flaw:
            raise self.flaw
        return (self._drawing or EventCanvas(*self._size)).image()


def render_slices(events: RecordedEvents, slices: list[Slice]) -> Iterator[EventImageBuilder]:
    """Return the sketch of each slice in the order given, as soon as it and those before it are done.

    No event is read twice, none that no slice needs, and a damaged place costs only the slices that include it.
    """
    waiting = deque(EventImageBuilder(first, stop, events.width, events.height) for first, stop in slices)
    for first, stop in iter_blocks(slices):
        _feed(events, first, stop, [sketch for sketch in waiting if sketch.first < stop and sketch.stop > first])
        while waiting and waiting[0].stop <= stop:
            yield waiting.popleft()
    yield from waiting


def iter_blocks(slices: list[Slice]) -> Iterator[Slice]:
    """Return the union of the slices in order and in blocks."""
    place = 0
    for first, stop in sorted(slices):
        place = max(place, first)
        while place < stop:
            after = min(place + EVENTS_PER_BLOCK, stop)
            yield place, after
            place = after


def _feed(events: RecordedEvents, first: int, stop: int, sketches: list[EventImageBuilder]) -> None:
    """Draws [first, stop) into all of the sketches; where it cannot be read, each one's own share of it."""
    place = first
    try:
        for part in events.parts(first, stop):
            for sketch in sketches:
                sketch.add(part, place)
            place += len(part)
    except InputError as error:
        if len(sketches) == 1:
            sketches[0].flaw = error
            return
        for sketch in sketches:
            low, high = max(place, sketch.first), min(stop, sketch.stop)
            if low < high:
                _feed(events, low, high, [sketch])

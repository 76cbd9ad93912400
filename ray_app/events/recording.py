"""Events of one sensor, checked once, where they come in.

Shapes: N = events.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import InputError

LATEST_US = 10**17
"""Times from here on, the year 5138, are no microseconds: nanoseconds of today's clock are above."""


@dataclass(frozen=True, slots=True)
class Events:
    """Events in time order; arrays of length N."""

    x: NDArray[np.uint16]
    """Column, 0 at the left."""
    y: NDArray[np.uint16]
    """Row, 0 at the top."""
    t_us: NDArray[np.int64]
    """Time in microseconds, never falling."""
    p: NDArray[np.uint8]
    """Polarity: 1 brighter, 0 darker."""
    width: int
    """Sensor columns."""
    height: int
    """Sensor rows."""

    def __len__(self) -> int:
        return len(self.t_us)

    @staticmethod
    def checked(
        x: NDArray[Any],
        y: NDArray[Any],
        t: NDArray[Any],
        p: NDArray[Any],
        width: int,
        height: int,
        where: str = "the recording",
    ) -> "Events":
        """Casts, and accepts polarity −1/+1.

        InputError, with the number and its position: lengths that differ, no integers, times that run backwards or
        are no microseconds, coordinates outside the sensor, another polarity. `where` names the input.
        """
        columns = {"x": np.asarray(x), "y": np.asarray(y), "t": np.asarray(t), "p": np.asarray(p)}
        for name, column in columns.items():
            if column.ndim != 1 or not (np.issubdtype(column.dtype, np.integer) or column.dtype == np.bool_):
                raise InputError(
                    f"{where}: '{name}' must be one column of whole numbers, it has shape {column.shape} and "
                    f"type {column.dtype}"
                )
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"{where}: the columns differ in length: {lengths}; is the file truncated?")
        times = columns["t"]
        if len(times) and (times.max() >= LATEST_US or times.min() <= -LATEST_US):
            i = int(((times >= LATEST_US) | (times <= -LATEST_US)).argmax())
            raise InputError(
                f"{where}: t = {times[i]} at event {i} is no time in microseconds, which reach {LATEST_US} in the "
                "year 5138; are they nanoseconds? Divide them by 1000"
            )
        t_us = times.astype(np.int64, copy=False)
        if (falling := t_us[1:] < t_us[:-1]).any():
            i = int(falling.argmax()) + 1
            raise InputError(
                f"{where}: times run backwards at event {i}: {t_us[i - 1]} µs, then {t_us[i]} µs; "
                "sort the recording by time"
            )
        for name, limit in (("x", width), ("y", height)):
            column = columns[name]
            if len(column) and (column.min() < 0 or column.max() >= limit):
                i = int(((column < 0) | (column >= limit)).argmax())
                raise InputError(
                    f"{where}: {name} = {columns[name][i]} at event {i} is outside the sensor of "
                    f"{width} x {height} pixels"
                )
        polarity = columns["p"]
        if len(polarity) and (polarity.min() < -1 or polarity.max() > 1):
            i = int(((polarity < -1) | (polarity > 1)).argmax())
            raise InputError(f"{where}: polarity {columns['p'][i]} at event {i}; it must be 0 and 1, or −1 and 1")
        if len(polarity) and polarity.min() < 0 and (zero := polarity == 0).any():
            raise InputError(
                f"{where}: polarity is 0 at event {int(zero.argmax())} and −1 at event "
                f"{int((polarity < 0).argmax())}; it must be 0 and 1, or −1 and 1"
            )
        return Events(
            x=columns["x"].astype(np.uint16, copy=False),
            y=columns["y"].astype(np.uint16, copy=False),
            t_us=t_us,
            p=polarity if polarity.dtype == np.uint8 else (polarity > 0).astype(np.uint8),
            width=width,
            height=height,
        )

    def between(self, t_start_us: int, t_end_us: int) -> "Events":
        """Events in [t_start_us, t_end_us): views, no copies."""
        return self[slice(*np.searchsorted(self.t_us, (t_start_us, t_end_us), side="left"))]

    def __getitem__(self, part: slice) -> "Events":
        return Events(self.x[part], self.y[part], self.t_us[part], self.p[part], self.width, self.height)

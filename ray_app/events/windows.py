"""Durations by name, and the windows that a sequence is cut into."""

import re
from dataclasses import dataclass

from ray_app.errors import ConfigError

UNITS_US = {"s": 1_000_000, "ms": 1_000, "us": 1}


@dataclass(frozen=True, slots=True)
class Window:
    """[t_start_us, t_end_us) of a sequence."""

    t_start_us: int
    """First microsecond."""
    t_end_us: int
    """First microsecond after it."""


def parse_duration(name: str) -> int:
    """`1s`, `0.5s`, `50ms`, `200us` in microseconds. ConfigError: another form, or not a whole number > 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|ms|us)", name)
    length_us = float(match[1]) * UNITS_US[match[2]] if match else 0.0
    if length_us < 1 or not length_us.is_integer():
        raise ConfigError(f"'{name}' is no duration; write a number and a unit, such as 1s, 50ms or 200us")
    return int(length_us)


def format_duration(length_us: int) -> str:
    """Microseconds in the largest unit that leaves a whole number: 1000000 → `1s`, 500000 → `500ms`."""
    for unit, unit_us in UNITS_US.items():
        if length_us % unit_us == 0:
            return f"{length_us // unit_us}{unit}"
    raise AssertionError("every whole number is divisible by 1")


def duration_suffix(name: str) -> str:
    """Return the reference's mark for a duration in file names: `1s` → `S1`, `50ms` → `S50ms`."""
    name = format_duration(parse_duration(name))
    return f"S{name.removesuffix('s')}" if re.fullmatch(r"\d+s", name) else f"S{name}"


def windows_between(t_first_us: int, t_last_us: int, duration_us: int, step_us: int) -> list[Window]:
    """Windows that start at `t_first_us` and every `step_us` after it, while they end by `t_last_us`.

    The reference's rule: by its own count, 1 s windows every 0.5 s over the image times of DSEC's 41 training
    sequences are 5,208.
    """
    assert duration_us > 0
    assert step_us > 0
    starts = range(t_first_us, t_last_us - duration_us + 1, step_us)
    return [Window(start, start + duration_us) for start in starts]

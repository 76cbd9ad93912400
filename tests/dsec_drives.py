"""Small DSEC drives that tests share, and what is asked of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from dsec_writer import (
    MADE_UP,
    DsecFiles,
    random_events,
    write_sequence,
)

from ray_app.events.recording import Events
from ray_app.sources.base import RawPair, Rejected
from ray_app.sources.dsec import DsecSource
from ray_app.sources.recorded import Cut

OFFSET_US = 49_599_300_776
"""Start of the file's clock, as large and as odd as real ones."""
BEGIN_US = OFFSET_US + 2_300
RGB = (180, 135)
NARROW = MADE_UP | {"camRect1": [value / 8 for value in MADE_UP["camRect1"]]}
"""The made-up cameras with frames of an eighth of the size, which are written and read quickly."""
SECOND = (1_000_000,)


def image_times(count: int, first_us: int = BEGIN_US) -> list[int]:
    return [first_us + i * 50_000 for i in range(count)]


def events_until(length_us: int, count: int = 20_000, seed: int = 0) -> Events:
    """From the start of the file's clock to `length_us` after the first image, and a little longer."""
    return random_events(count, OFFSET_US, BEGIN_US + length_us + 5_000, seed)


def write_small(root: Path, name: str = "zurich_city_00_a", frames: int = 41, **settings: Any) -> DsecFiles:
    """A drive with an image every 50 ms."""
    files = DsecFiles(root, name, settings.pop("layout", "tree"), settings.pop("part", "train"))
    events = settings.pop("events", None) or events_until(50_000 * frames, seed=len(name))
    constants = settings.pop("constants", NARROW)
    return write_sequence(
        files, events, image_times(frames), constants, t_offset_us=OFFSET_US, rgb_size=RGB, **settings
    )


def dsec(root: Path, durations_us: tuple[int, ...] = SECOND, **settings: Any) -> DsecSource:
    """A source; settings of the cut and of the source by name."""
    own = {name: settings.pop(name) for name in ("align", "boundaries") if name in settings}
    return DsecSource(root, Cut(durations_us, **settings), **own)


def everything(source: DsecSource) -> list[RawPair | Rejected]:
    return [item for task in source.tasks() for item in source.pairs(task)]


def pairs_of(source: DsecSource) -> list[RawPair]:
    found = everything(source)
    assert [item for item in found if isinstance(item, Rejected)] == []
    return [item for item in found if isinstance(item, RawPair)]


def rejected(source: DsecSource) -> list[Rejected]:
    return [item for item in everything(source) if isinstance(item, Rejected)]


def same(one: RawPair, other: RawPair) -> bool:
    return (
        (one.sequence, one.t_start_us, one.t_end_us) == (other.sequence, other.t_start_us, other.t_end_us)
        and np.array_equal(one.event_HWC, other.event_HWC)
        and np.array_equal(one.target_HWC, other.target_HWC)
    )


def edit(path: Path, change: Callable[[h5py.File], None]) -> None:
    with h5py.File(path, "r+") as file:
        change(file)


def put(name: str, value: Any, **options: Any) -> Callable[[h5py.File], None]:
    """Replaces a dataset."""

    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, data=value, **options)

    return change

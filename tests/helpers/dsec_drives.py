"""Small DSEC drives that tests share, and what is asked of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from dsec_writer import HEIGHT, MADE_UP, WIDTH, DsecFiles, random_events, write_sequence
from numpy.typing import NDArray

from ray_app.events.recording import Events
from ray_app.events.simulator import EventSimulator, SimulatedEvents
from ray_app.scenes.scene import Scene
from ray_app.sources.base import RawPair, RejectedPair
from ray_app.sources.dsec.source import DsecSource
from ray_app.sources.recorded import WindowingConfig
from ray_app.sources.scenes import FRAME_US, SCENE_SENSOR

OFFSET_US = 49_599_300_776
"""Start of the file's clock, as large and as odd as real ones."""
BEGIN_US = OFFSET_US + 2_300
RGB = (180, 135)
NARROW = MADE_UP | {"camRect1": [value / 8 for value in MADE_UP["camRect1"]]}
"""The made-up cameras with frames of an eighth of the size, which are written and read quickly."""
SECOND = (1_000_000,)
ONE_CAMERA = MADE_UP | dict.fromkeys(("cam0", "camRect1"), MADE_UP["camRect0"]) | {"cam0_distortion": [0.0] * 4}
"""Events and frames of the same pixels."""


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


@dataclass(frozen=True)
class SceneDrive:
    """A rendered drive in the DSEC layout, and what went into it."""

    files: DsecFiles
    events: Events
    """Simulated, at absolute times."""
    frames: list[NDArray[np.uint8]]
    """At 20 Hz, seen by the same pixels."""
    times_us: list[int]
    """Of the frames."""


def write_scene(root: Path, name: str, seed: int, num_frames: int) -> SceneDrive:
    """Events of a scene's true motion, as `prepare scenes` simulates them, and its pictures at 20 Hz.

    Both cameras are one here, without distortion, so that alignment changes nothing.
    """
    scene, rng = Scene(seed, HEIGHT, WIDTH), np.random.default_rng(seed)
    sensor = EventSimulator(SCENE_SENSOR, HEIGHT, WIDTH, rng)
    sensor.start(scene.grey(0.0), 0, random_phase=True)
    steps_us = range(FRAME_US, num_frames * 50_000, FRAME_US)
    found = SimulatedEvents.joined([sensor.step(scene.grey(t_us * 1e-6), t_us) for t_us in steps_us])
    events = Events(found.x, found.y, found.t_us + BEGIN_US, found.p, WIDTH, HEIGHT)
    frames, times_us = [scene.rgb(i * 0.05) for i in range(num_frames)], image_times(num_frames)
    files = write_sequence(
        DsecFiles(root, name),
        events,
        times_us,
        ONE_CAMERA,
        t_offset_us=OFFSET_US,
        rgb_size=(WIDTH, HEIGHT),
        pictures=frames,
    )
    return SceneDrive(files, events, frames, times_us)


def dsec(root: Path, durations_us: tuple[int, ...] = SECOND, **settings: Any) -> DsecSource:
    """A source; settings of the cut and of the source by name."""
    own = {name: settings.pop(name) for name in ("align", "window_rounding") if name in settings}
    return DsecSource(root, WindowingConfig(durations_us, **settings), **own)


def everything(source: DsecSource) -> list[RawPair | RejectedPair]:
    return [item for task in source.tasks() for item in source.pairs(task)]


def pairs_of(source: DsecSource) -> list[RawPair]:
    found = everything(source)
    assert [item for item in found if isinstance(item, RejectedPair)] == []
    return [item for item in found if isinstance(item, RawPair)]


def rejected(source: DsecSource) -> list[RejectedPair]:
    return [item for item in everything(source) if isinstance(item, RejectedPair)]


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

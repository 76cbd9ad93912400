"""Rendered driving scenes with simulated events: a source that needs no download.

A drive is one sequence; its window i is [i · step, i · step + duration). Events are simulated over a span in the
middle of the window, from frames rendered at the drive's true motion, and drawn as one image; the target is the
frame at the window's middle. Each window starts its simulator afresh, at a random phase of every pixel, so that a
pair depends on the source's settings and its own place alone. A standing vehicle sees little but other traffic and
noise; a window without one event is a white image, and a pair all the same: a standing camera is real.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_app.errors import ConfigError
from ray_app.events.recording import Events
from ray_app.events.render import drawn_parts, event_image
from ray_app.events.simulator import EventSimulator, SimulatedEvents, SimulatorConfig
from ray_app.events.windows import format_duration
from ray_app.scenes.scene import RENDERER, Scene
from ray_app.sources.base import ONE_EACH, RawPair, SourceTask, Views, spread

SCENE_SENSOR = SimulatorConfig(
    theta_on=0.24,
    theta_off=0.29,
    sigma=0.035,
    cutoff_hz=200.0,
    leak_rate_hz=0.1,
    shot_noise_hz=0.5,
    refractory_us=300,
)
"""Brings scenes into the ranges of real recordings (events, active pixels, polarity) in 50 ms; measured by
benchmarks/data/scene_statistics.py. The ON threshold is the lower one, so more than half of the events are ON."""
FRAME_US = 5000
"""Longest time between two rendered frames of a simulation: 200 frames a second or more."""
SCENE_PAIRS_PER_TASK = 24
"""Most pairs of a task."""


@dataclass(frozen=True)
class ScenesSource:
    """`num_pairs` windows, spread evenly over `num_sequences` drives; the first drives get one more."""

    num_pairs: int
    """Pairs in all."""
    num_sequences: int
    """Drives."""
    seed: int
    """Seed of worlds, drives and sensor noise."""
    width: int = 640
    """Picture and sensor columns."""
    height: int = 480
    """Picture and sensor rows."""
    duration_us: int = 1_000_000
    """Window length."""
    step_us: int = 500_000
    """Distance between window starts."""
    event_span_us: int = 50_000
    """Length of the simulated part in the middle of each window."""
    views: Views = ONE_EACH
    """Pictures of each pair."""

    name = "scenes"

    def __post_init__(self) -> None:
        """ConfigError: settings that do not fit together."""
        if self.seed < 0:
            raise ConfigError(f"--seed ({self.seed}) must not be negative.")
        if self.num_sequences > self.num_pairs:
            raise ConfigError(
                f"--num-sequences ({self.num_sequences}) is more than --num-pairs ({self.num_pairs}); every "
                "drive needs a pair."
            )
        if self.event_span_us > self.duration_us:
            raise ConfigError(
                f"--event-span ({format_duration(self.event_span_us)}) is longer than --duration "
                f"({format_duration(self.duration_us)}); events come from the middle of the window."
            )

    def describe(self) -> dict[str, Any]:
        return {
            "events": "simulated",
            "renderer": RENDERER,
            **{key: value for key, value in asdict(self).items() if key != "views"},
            "longest_frame_us": FRAME_US,
            "simulator": asdict(SCENE_SENSOR),
        }

    def durations(self) -> list[str]:
        return [format_duration(self.duration_us)]

    def tasks(self) -> list[SourceTask]:
        digits = max(4, len(str(self.num_sequences - 1)))
        tasks = []
        for k, windows in enumerate(_evenly(self.num_pairs, self.num_sequences)):
            first = 0
            for part in _evenly(windows, -(-windows // SCENE_PAIRS_PER_TASK)):
                spec = {"drive": k, "sequence": f"scene_{k:0{digits}d}", "first": first}
                tasks.append(SourceTask(f"{spec['sequence']}_{first:06d}", part, spec))
                first += part
        return tasks

    def pairs(self, task: SourceTask) -> Iterator[RawPair]:
        drive, first = task.spec["drive"], task.spec["first"]
        scene = self.scene(drive)
        for window in range(first, first + task.num_pairs):
            start_us = window * self.step_us
            frame_us = start_us + self.duration_us // 2
            events = self.events(scene, drive, window)
            images: tuple[NDArray[np.uint8], ...] = ()
            if self.views.num_event_images > 1:
                images = tuple(event_image(part) for part in drawn_parts(events, self.views.num_event_images))
            frames: tuple[NDArray[np.uint8], ...] = ()
            if self.views.num_frames > 1:
                times_us = spread(range(start_us, start_us + self.duration_us), self.views.num_frames)
                frames = tuple(scene.rgb(t_us * 1e-6) for t_us in times_us)
            yield RawPair(
                sequence=task.spec["sequence"],
                t_start_us=start_us,
                t_end_us=start_us + self.duration_us,
                event_HWC=event_image(events),
                target_HWC=scene.rgb(frame_us * 1e-6),
                num_events=len(events) if self.event_span_us == self.duration_us else None,
                num_drawn=len(events),
                num_positive=int(np.count_nonzero(events.p)),
                target_t_us=frame_us,
                event_images=images,
                frames=frames,
            )

    def scene(self, drive: int) -> Scene:
        """Return the world and motion of a drive."""
        seed = int(np.random.SeedSequence([self.seed, drive]).generate_state(1)[0])
        return Scene(seed, self.height, self.width)

    def events(self, scene: Scene, drive: int, window: int) -> Events:
        """Return simulated events of the span in the middle of a window, in time order."""
        begin_us = window * self.step_us + (self.duration_us - self.event_span_us) // 2
        frames = -(-self.event_span_us // FRAME_US)
        first_us, *times_us = [begin_us + self.event_span_us * i // frames for i in range(frames + 1)]
        rng = np.random.default_rng([self.seed, drive, window])
        sensor = EventSimulator(SCENE_SENSOR, self.height, self.width, rng)
        sensor.start(scene.grey(first_us * 1e-6), first_us, random_phase=True)
        found = SimulatedEvents.joined([sensor.step(scene.grey(t_us * 1e-6), t_us) for t_us in times_us])
        return Events(found.x, found.y, found.t_us, found.p, self.width, self.height)


def _evenly(total: int, parts: int) -> list[int]:
    """`total` in `parts` numbers that differ by one at most, the larger first."""
    return [total // parts + (i < total % parts) for i in range(parts)]

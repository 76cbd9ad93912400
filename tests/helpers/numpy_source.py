"""A small deterministic source without files: blurred moving blobs as frames, their edges as events."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_app.commands.prepare.store_builder import build_task, claim_store, finish
from ray_app.errors import InputError
from ray_app.sources.base import RawPair, RejectedPair, SourceTask
from ray_app.store.manifest import Features, FeatureSpec

SMALL = FeatureSpec(dtype="uint8", shape=(3, 16, 16), scale=1 / 255)
STEP_US = 500_000


@dataclass(frozen=True)
class NumpySource:
    """`num_sequences` drives of `num_windows` windows of 1 s that overlap by half; one task a drive."""

    num_sequences: int = 6
    num_windows: int = 12
    height: int = 20
    width: int = 24
    seed: int = 0
    bad: tuple[tuple[int, int], ...] = ()
    """(sequence, window) that cannot be built."""
    unreadable: tuple[int, ...] = ()
    """Sequences whose input breaks off at once."""
    broken_off: tuple[tuple[int, int], ...] = ()
    """(sequence, window) from which on the input cannot be read."""
    twins: tuple[tuple[int, int], ...] = ()
    """(sequence, other): a sequence that repeats another under the other's name."""
    black: tuple[tuple[int, int], ...] = ()
    """(sequence, window) whose target is black."""

    name = "numpy"

    def describe(self) -> dict[str, Any]:
        return {"events": "simulated", "seed": self.seed, "size": [self.width, self.height]}

    def durations(self) -> list[str]:
        return ["1s"]

    def tasks(self) -> list[SourceTask]:
        return [SourceTask(f"drive_{s:04d}", self.num_windows, {"sequence": s}) for s in range(self.num_sequences)]

    def pairs(self, task: SourceTask) -> Iterator[RawPair | RejectedPair]:
        sequence = task.spec["sequence"]
        if sequence in self.unreadable:
            raise InputError(f"{task.name}: nothing in it can be read")
        drawn = dict(self.twins).get(sequence, sequence)
        for window in range(self.num_windows):
            if (sequence, window) in self.broken_off:
                raise InputError(f"{task.name}: ends at window {window}")
            if (sequence, window) in self.bad:
                yield RejectedPair(task.name, f"window {window}", "made to fail")
                continue
            frame = self.frame(drawn, window)
            edges = np.abs(np.diff(frame.astype(np.int16), axis=1, append=frame[:, -1:])).max(-1) > 8
            event = np.full_like(frame, 255)
            event[edges & (frame[..., 0] >= frame[..., 2])] = (255, 0, 0)
            event[edges & (frame[..., 0] < frame[..., 2])] = (0, 0, 255)
            if (sequence, window) in self.black:
                frame = np.zeros_like(frame)
            start = window * STEP_US
            yield RawPair(f"drive_{drawn:04d}", start, start + 1_000_000, event, frame)

    def frame(self, sequence: int, window: int) -> NDArray[np.uint8]:
        """A drive's own background and a blob that moves, (height, width, 3)."""
        rng = np.random.default_rng((self.seed, sequence))
        colour, blob = rng.uniform(30, 120, 3), rng.uniform(80, 130, 3)
        y, x = np.mgrid[: self.height, : self.width]
        centre = rng.uniform(0, self.width) + 1.7 * window
        near = np.exp(-(((x - centre % self.width) / 4) ** 2) - ((y - self.height / 2) / 5) ** 2)
        shade = 1 + 0.4 * np.sin(x / 3 + sequence) * np.cos(y / 4)
        return np.clip(colour * shade[..., None] + blob * near[..., None], 0, 255).astype(np.uint8)


def build_store(source: NumpySource, folder: Path, feature: FeatureSpec = SMALL) -> Path:
    """The store as `prepare` builds it, one task after the other and without Ray."""
    features = Features(event=feature, target=feature)
    tasks = source.tasks()
    claim_store(folder, source, tasks, features)
    finish(folder, source, [build_task(source, task, folder, features) for task in tasks], features, 0.5)
    return folder

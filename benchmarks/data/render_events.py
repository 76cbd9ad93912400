"""Vectorised rendering of events against the per-event Python loop of EventGPT, in one run.

    python -m benchmarks.data.render_events RECORDING.npy

The loop assigns one colour for each event, as generate_event_image of EventGPT does. Both are timed in turn,
several times; the ratio is that of the medians. Writes benchmarks/results/render_events.json.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.provenance import require_commit, save
from ray_app.events.recording import Events
from ray_app.events.render import event_image
from ray_app.sources.npy import events_of, read_npy

ROUNDS = 7


def per_event(events: Events) -> NDArray[np.uint8]:
    image = np.ones((events.height, events.width, 3), dtype=np.uint8) * 255
    for x, y, p in zip(events.x, events.y, events.p, strict=True):
        if p == 0:
            image[y, x] = np.array([0, 0, 255])
        else:
            image[y, x] = np.array([255, 0, 0])
    return image


def seconds(function: Callable[[Events], NDArray[np.uint8]], events: Events, repeat: int) -> float:
    began = time.perf_counter()
    for _ in range(repeat):
        function(events)
    return (time.perf_counter() - began) / repeat


def main() -> None:
    events = events_of(read_npy(Path(sys.argv[1])), 640, 480, sys.argv[1])
    assert np.array_equal(per_event(events), event_image(events))
    loop, vectorised = [], []
    for _ in range(ROUNDS):
        loop.append(seconds(per_event, events, 1))
        vectorised.append(seconds(event_image, events, 20))
    slow, fast = statistics.median(loop), statistics.median(vectorised)
    save(
        "render_events",
        {
            "recording": Path(sys.argv[1]).name,
            "events": len(events),
            "loop_ms": round(slow * 1e3, 3),
            "vectorised_ms": round(fast * 1e3, 4),
            "ratio": round(slow / fast, 1),
            "ratios_by_round": [round(a / b, 1) for a, b in zip(loop, vectorised, strict=True)],
            "ns_per_event": round(fast * 1e9 / len(events), 2),
            "bit_equal": True,
        },
    )


if __name__ == "__main__":
    require_commit()
    main()
